"""`phi3v-data`: parse, call, print, exit status. Everything else is in the modules it calls.

Imports of the working modules stand inside the commands: `--help` answers at once.
"""

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from phi3v_data.convert import ConversionResult

CONTEXT = {
    "help_option_names": ["-h", "--help"],
    # --out_dir and --out-dir are the same option, on every command.
    "token_normalize_func": lambda token: token.replace("-", "_"),  # pyright: ignore
    "max_content_width": 100,
}


class InputError(click.ClickException):
    """What was given is not what the command takes; one line says what to do."""

    exit_code = 2


@click.group(context_settings=CONTEXT)
@click.version_option(package_name="phi3v-data")
def main() -> None:
    """Turn raw data sets into validated shards for fine-tuning Phi-3.5-vision."""


@main.command("convert")
@click.argument("converter", required=False)
@click.argument("source", required=False, type=click.Path())
@click.option("--out_dir", type=click.Path(), help="Where the output goes; made if need be.")
@click.option("--num_frames", type=int, help="Frames per clip, evenly spaced.  [ucf101: 8]")
@click.option("--quality", type=int, help="JPEG quality of frames, 1 to 100.  [ucf101: 75]")
@click.option(
    "--short",
    type=click.Choice(["repeat", "fewer", "reject"]),
    help="A clip with fewer frames than that: repeat some, give fewer, or reject it."
    "  [ucf101: repeat]",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="Any other option of the converter; the value is JSON, or else text. May be repeated.",
)
@click.option("--workers", type=click.IntRange(0), help="Processes; 0: none.  [one per core]")
@click.option("--limit", type=click.IntRange(1), help="Convert the first LIMIT items only.")
@click.option("--overwrite", is_flag=True, help="Remove an earlier conversion and start anew.")
@click.option("--list", "list_only", is_flag=True, help="List the installed converters.")
@click.pass_context
def convert_command(
    context: click.Context,
    converter: str | None,
    source: str | None,
    out_dir: str | None,
    num_frames: int | None,
    quality: int | None,
    short: str | None,
    settings: tuple[str, ...],
    workers: int | None,
    limit: int | None,
    overwrite: bool,
    list_only: bool,
) -> None:
    r"""Convert a raw data set to images and conversations JSONL.

    CONVERTER is an installed one (see --list) or your own, module:object, looked for in the current
    folder too. SOURCE is the data set's folder, or a .tar.gz of it.

    \b
      phi3v-data convert ucf101 UCF101_subset --out_dir converted
      phi3v-data convert my_module:MyConverter raw --out_dir converted --set lang=en

    \b
    gives
      converted/images/train/Archery/v_Archery_g01_c01.0.jpg ...
      converted/ucf101_train.jsonl  ucf101_val.jsonl  ucf101_test.jsonl
      converted/rejected.jsonl      where something was rejected, with item and reason
      converted/manifest.json       settings, counts and hashes

    What was interrupted, even by kill -9, continues when the same command is run again. The output
    is the same bytes whatever the number of workers.

    Exit status: 0 done (rejected items are counted), 1 not one sample came out or the machine
    failed, 2 wrong usage, 130 Ctrl-C.
    """
    import os
    import sys

    from phi3v_data.converters import get_converter, list_converters

    if list_only:
        for name, target in list_converters().items():
            click.echo(f"{name}\t{target}")
        return
    for what, value in (("CONVERTER", converter), ("SOURCE", source), ("--out_dir", out_dir)):
        if value is None:
            raise click.UsageError(f"missing {what}; see --help for an example")
    assert converter is not None
    assert source is not None
    assert out_dir is not None

    from phi3v_data.convert import convert

    named = {"num_frames": num_frames, "quality": quality, "short": short}
    options: dict[str, object] = {k: v for k, v in named.items() if v is not None}
    sys.path.insert(0, os.getcwd())  # for module:object; a console script does not look there
    try:
        result = convert(
            get_converter(converter, **options, **_parse_settings(settings)),
            source,
            out_dir,
            num_workers=workers,
            overwrite=overwrite,
            limit=limit,
            progress=sys.stderr.isatty(),
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error}; what is finished is kept, run again") from error
    except KeyboardInterrupt as error:
        click.echo(str(error) or "interrupted; run the same command again", err=True)
        context.exit(130)
    _print_conversion(result)
    if not any(result.counts.values()):
        context.exit(1)


def _parse_settings(settings: tuple[str, ...]) -> dict[str, object]:
    import json

    parsed: dict[str, object] = {}
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator or not name.isidentifier():
            raise click.UsageError(f"--set: expected NAME=VALUE, got {setting!r}")
        try:
            parsed[name] = json.loads(text)
        except ValueError:
            parsed[name] = text
    return parsed


def _print_conversion(result: "ConversionResult") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    table = Table(
        "split", "samples", "file", title=f"{result.num_items} items", title_justify="left"
    )
    table.columns[1].justify = "right"
    for split, count in result.counts.items():
        table.add_row(split, f"{count:,}", Text(result.files[split].name))
    console.print(table)
    if result.rejected:
        rejected = Table("rejected because", "count", title_justify="left")
        rejected.columns[1].justify = "right"
        for reason, count in result.rejected.items():
            rejected.add_row(Text(reason), f"{count:,}", style="red")
        console.print(rejected)
        console.print(Text(f"Each is listed in {result.rejected_file}"))
    if result.num_reused:
        console.print(f"{result.num_reused:,} items were finished by an earlier run.")
    if any(result.counts.values()):
        first = next(path for split, path in result.files.items() if result.counts[split])
        console.print(Text(f"Next: phi3v-data validate {first}"))
