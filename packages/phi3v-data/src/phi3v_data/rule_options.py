"""The options of `validate` and `shard` that say what data is checked by: the same on both.

@click.command("shard")
@with_rule_options
def shard_command(context, files, ..., **options): ...

config = load_options(options)      # the command line over the nearest pyproject.toml
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from phi3v_data.input_error import InputError

if TYPE_CHECKING:
    from phi3v_data.validate_config import ValidateConfig

_Function = TypeVar("_Function", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--select", multiple=True, metavar="CODE", help="Run these rules only, by prefix."
    ),
    click.option("--ignore", multiple=True, metavar="CODE", help="Do not run these, by prefix."),
    click.option(
        "--severity",
        multiple=True,
        metavar="CODE=LEVEL",
        help="error, warning or off, for codes by prefix.",
    ),
    click.option(
        "--max_errors", type=click.IntRange(1), help="Stop at so many errors.  [look at everything]"
    ),
    click.option(
        "--allow_missing_answer",
        is_flag=True,
        help="The last turn may lack its answer (test splits).",
    ),
    click.option(
        "--num_crops",
        type=click.IntRange(1),
        help="Most crops an image in training (its data.num_crops): how long and thin one may be."
        "  [16]",
    ),
    click.option(
        "--level",
        type=click.Choice(["header", "deep", "full"]),
        help="How closely images are looked at: header (there, of a known format), deep (every "
        "truncated or damaged file), full (every pixel decoded).  [deep]",
    ),
    click.option("--no_cache", is_flag=True, help="Look at images again that did not change."),
    click.option(
        "--unused",
        is_flag=True,
        help="Find image files under the image root that no sample names.",
    ),
)


def with_rule_options(function: _Function) -> _Function:
    """Give a command these options, in this order."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def load_options(options: Mapping[str, Any], output_format: str | None = None) -> "ValidateConfig":
    """The settings of the nearest pyproject.toml with those of the command line on top.

    Rules of other packages that cannot be used are named on the error stream: they are no reason
    not to check data.

    Args:
        options: values of the options by name; `allow_missing_answer` is no setting of a file.
        output_format: as given to `--format`, where the command has it.

    Raises:
        ValueError: a setting is wrong.
    """
    import warnings

    from phi3v_data.rules import broken_rules
    from phi3v_data.validate_config import load_config

    # What Pillow has to say about a file becomes a finding; its warnings would only repeat it.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    overrides: dict[str, Any] = {
        "select": _codes(options["select"]) or None,
        "ignore": _codes(options["ignore"]) or None,
        "severity": _levels(options["severity"]),
        "max_errors": options["max_errors"],
        "format": output_format,
        "num_crops": options["num_crops"],
        "level": options["level"],
        "cache": False if options["no_cache"] else None,
        "unused": options["unused"] or None,
    }
    config = load_config(Path.cwd(), overrides)
    for broken in broken_rules():
        click.echo(f"warning: {broken}", err=True)
    return config


def _levels(values: tuple[str, ...]) -> dict[str, str]:
    """`("T101=warning,D=off",)` -> `{"T101": "warning", "D": "off"}`."""
    levels: dict[str, str] = {}
    for value in _codes(values):
        code, _, level = value.partition("=")
        if level not in ("error", "warning", "off"):
            raise InputError(f"--severity: expected CODE=error, warning or off, got {value!r}")
        levels[code.strip()] = level
    return levels


def _codes(values: tuple[str, ...]) -> list[str]:
    """`("I,T101", "P")` -> `["I", "T101", "P"]`."""
    return [code.strip() for value in values for code in value.split(",")]
