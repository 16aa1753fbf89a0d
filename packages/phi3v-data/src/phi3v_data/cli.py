"""`phi3v-data`: parse, call, print, exit status. Everything else is in the modules it calls.

Imports of the working modules stand inside the commands: `--help` answers at once.
"""

import click

CONTEXT = {
    "help_option_names": ["-h", "--help"],
    # --out_dir and --out-dir are the same option, on every command.
    "token_normalize_func": lambda token: token.replace("-", "_"),  # pyright: ignore
    "max_content_width": 100,
}


@click.group(context_settings=CONTEXT)
@click.version_option(package_name="phi3v-data")
def main() -> None:
    """Turn raw data sets into validated shards for fine-tuning Phi-3.5-vision."""
