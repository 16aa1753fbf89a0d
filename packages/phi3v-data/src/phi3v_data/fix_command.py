"""`phi3v-data validate --fix`: its options, and what it prints.

phi3v-data validate train.jsonl --fix
train.jsonl → train.fixed.jsonl: 12 lines repaired (S104 9, I101 3)
  3 errors left (T101 3)
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from phi3v_data.rules.rule import Rule

FIX_OPTIONS = (
    click.option(
        "--fix",
        "fix",
        is_flag=True,
        help="Repair what can be repaired with what is said unchanged: <name>.fixed.jsonl.",
    ),
    click.option(
        "--unsafe_fix",
        is_flag=True,
        help="Guess, too, and drop what is still wrong, into <name>.dropped.jsonl.",
    ),
    click.option(
        "--in_place",
        is_flag=True,
        help="With --fix: replace the file; the old one is kept as <name>.jsonl.bak.",
    ),
    click.option(
        "--out_dir",
        type=click.Path(file_okay=False),
        help="With --fix: write the files there, under their names.",
    ),
)


def with_fix_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--fix`, `--unsafe_fix`, `--in_place` and `--out_dir` to a command."""
    for option in reversed(FIX_OPTIONS):
        command = option(command)
    return command


def run_fix(
    files: Sequence[str],
    *,
    unsafe_fix: bool,
    in_place: bool,
    out_dir: str | None,
    images: str | None,
    rules_for: "Callable[[str], tuple[Rule, ...]]",
    allow_missing_answer: bool,
    num_crops: int,
    workers: int | None,
) -> int:
    """Fix files and print what was done; return the exit status: 1 where errors are left.

    Raises:
        ValueError: as `phi3v_data.fix_files.fix_files`.
        click.ClickException: a file could not be written.
    """
    from phi3v_data.fix_files import fix_files, to_text
    from phi3v_data.progress_bars import progress_bar
    from phi3v_data.report import printable

    try:
        with progress_bar("fixing") as progress:
            result = fix_files(
                files,
                images=images,
                unsafe=unsafe_fix,
                in_place=in_place,
                out_dir=out_dir,
                rules_for=rules_for,
                allow_missing_answer=allow_missing_answer,
                num_crops=num_crops,
                num_workers=workers,
                progress=progress,
            )
    except OSError as error:
        raise click.ClickException(str(error)) from error
    for line in to_text(result).splitlines():
        click.echo(printable(line))
    return result.exit_status


def refuse_lone_options(
    *, fix: bool, unsafe_fix: bool, in_place: bool, out_dir: str | None
) -> bool:
    """Whether files are to be fixed.

    Raises:
        click.UsageError: `--in_place` or `--out_dir` without `--fix`.
    """
    if not (fix or unsafe_fix) and (in_place or out_dir is not None):
        lone = "--in_place" if in_place else "--out_dir"
        raise click.UsageError(f"{lone} says where --fix or --unsafe_fix writes; add one of them")
    return fix or unsafe_fix
