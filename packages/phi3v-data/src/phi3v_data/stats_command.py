"""`phi3v-data stats`: what a data set is made of, as tables or JSON."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from phi3v_data.input_error import InputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from phi3v_data.stats import DatasetStats, Distribution, Stats

MAX_ANSWERS_SHOWN = 30
BAR_WIDTH = 20

WIDTH = 120
"""Columns where the output is no terminal."""


@click.command("stats")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--images",
    type=click.Path(exists=True, file_okay=False),
    help="Image root.  [images/ beside each file, else its folder]",
)
@click.option("--no_images", is_flag=True, help="Do not open images: no sizes, no formats.")
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
)
@click.option(
    "--workers", type=click.IntRange(1), help="Threads that read headers.  [two per core]"
)
@click.pass_context
def stats_command(
    context: click.Context,
    files: tuple[str, ...],
    images: str | None,
    no_images: bool,
    output_format: str,
    workers: int | None,
) -> None:
    """Count what is in conversations files.

    Samples, turns, images and their sizes and formats (from the header of each distinct image),
    answers, lengths of texts: of each file, and of all. Any number of lines takes bounded memory:
    above 262,144 distinct images their number and sizes are estimated, and marked with ~.

    \b
      phi3v-data stats train.jsonl val.jsonl
      phi3v-data stats train.jsonl --no_images
      phi3v-data stats train.jsonl --format json | jq .total.num_samples

    Lines that do not parse are counted and named; `phi3v-data validate` finds all that is wrong.

    \b
    --format json gives {"version": 1, "files": [S, ...], "total": S}, S being
      file                  as given; null in the total
      num_lines, num_samples, num_unparsed, unparsed [{file, line, problem}] (the first 20)
      sources               name: samples
      num_turns, turns_per_sample (D), num_unanswered
      num_images            references; an image used twice counts twice
      num_distinct_images, is_exact_images, images_per_sample (D)
      num_distinct_answers, is_exact_answers
      answers               answer: turns, where they look like classes; else null
      user_chars, assistant_chars (D)
      images                null with --no_images; else width and height (D), sizes
                            [{width, height, count}], formats and problems {name: images}
    and D a distribution
      count, mean, min, p5, p25, p50, p75, p95, p99, max
      counts                value: how often; null with more than 200 values
    Keys may be added, never removed or changed, while version is 1.

    Exit status: 0, also where lines do not parse; 2 wrong usage.
    """
    from phi3v_data.progress_bars import progress_bar
    from phi3v_data.stats import collect_stats, to_json

    try:
        with progress_bar("counting") as progress:
            stats = collect_stats(
                files,
                images=images,
                look_at_images=not no_images,
                num_workers=workers,
                progress=progress,
            )
    except ValueError as error:
        raise InputError(str(error)) from error
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        context.exit(130)
    if output_format == "json":
        click.echo(to_json(stats))
    else:
        print_stats(stats)


def print_stats(stats: "DatasetStats", console: "Console | None" = None) -> None:
    """Print the tables; coloured on a terminal, unless NO_COLOR is set."""
    from rich.console import Console

    from phi3v_data.report import count, printable

    if console is None:
        console = Console(soft_wrap=True, highlight=False)
        if not console.is_terminal:
            console.width = max(console.width, WIDTH)
    columns: list[Stats] = list(stats.files)
    if len(columns) > 1:
        columns.append(stats.total)
    else:
        console.print(f"[bold]{_escape(printable(columns[0].file))}[/]")
    console.print(_overview(stats, columns))
    console.print(_lengths(columns[-1], stats.looked_at_images))
    if stats.total.classes:
        console.print(_answers(stats, columns))
    for file, line, problem in stats.total.unparsed:
        console.print(f"{_escape(printable(file))}:{line}: [yellow]not counted[/]: ", end="")
        console.print(_escape(printable(problem)))
    if stats.total.num_unparsed:
        rest = stats.total.num_unparsed - len(stats.total.unparsed)
        more = f", {rest:,} of them not named here" if rest else ""
        console.print(
            f"[yellow]{count(stats.total.num_unparsed, 'line')} left out{more}[/]: "
            "`phi3v-data validate` explains"
        )


def _overview(stats: "DatasetStats", columns: Sequence["Stats"]) -> "Table":
    from phi3v_data.report import printable
    from phi3v_data.stats import ranked

    def distinct(number: int, is_exact: bool) -> str:
        return f"{number:,}" if is_exact else f"~{number:,}"

    def span(distribution: "Distribution") -> str:
        low, high, mean = distribution.minimum, distribution.maximum, distribution.mean
        if low is None or high is None or mean is None:
            return "-"
        return f"{low:,}" if low == high else f"mean {mean:,.1f}"

    table = _table("")
    for name in _names(columns):
        table.add_column(name if len(columns) > 1 else "", justify="right")

    def row(name: str, *values: str) -> None:
        table.add_row(name, *(_escape(value) for value in values))

    row("samples", *(f"{c.num_samples:,}" for c in columns))
    if stats.total.num_unparsed:
        row("lines that do not parse", *(f"{c.num_unparsed:,}" for c in columns))
    row("turns", *(f"{c.num_turns:,}" for c in columns))
    row("  per sample", *(span(c.turns_per_sample) for c in columns))
    if stats.total.num_unanswered:
        row("  without answer", *(f"{c.num_unanswered:,}" for c in columns))
    row("images", *(f"{c.num_images:,}" for c in columns))
    row("  per sample", *(span(c.images_per_sample) for c in columns))
    row("  distinct", *(distinct(c.images.count, c.images.is_exact) for c in columns))
    row("different answers", *(distinct(c.answers.count, c.answers.is_exact) for c in columns))
    for name, _ in ranked(stats.total.sources)[:5]:
        shown = printable(name) or "others"
        row(f"source {_escape(shown)}", *(f"{c.sources[name]:,}" for c in columns))
    for name, _ in ranked(stats.total.formats):
        row(name, *(f"{c.formats[name]:,}" for c in columns))
    for name, _ in ranked(stats.total.problems):
        row(f"[yellow]{name} images[/]", *(f"{c.problems[name]:,}" for c in columns))
    for width, height in [size for size, _ in ranked(stats.total.sizes)][:5]:
        row(f"{width:,} x {height:,}", *(f"{c.sizes[width, height]:,}" for c in columns))
    if len(stats.total.sizes) > 5:
        row("other sizes", *(f"{_other_sizes(c, stats.total):,}" for c in columns))
    return table


def _other_sizes(stats: "Stats", total: "Stats") -> int:
    from phi3v_data.stats import ranked

    shown = {size for size, _ in ranked(total.sizes)[:5]}
    return sum(number for size, number in stats.sizes.items() if size not in shown)


def _lengths(stats: "Stats", looked_at_images: bool) -> "Table":
    from phi3v_data.stats import QUANTILES

    table = _table("of all files")
    for name in ("min", "5 %", "25 %", "50 %", "75 %", "95 %", "99 %", "max", "mean"):
        table.add_column(name, justify="right")
    rows = [
        ("prompt, characters", stats.user_chars),
        ("answer, characters", stats.assistant_chars),
        ("images per sample", stats.images_per_sample),
    ]
    if looked_at_images:
        rows += [("width, pixels", stats.along(0)), ("height, pixels", stats.along(1))]
    for name, distribution in rows:
        mean = distribution.mean
        if mean is not None:
            quantiles = [distribution.quantile(fraction) for fraction in QUANTILES]
            values = [distribution.minimum, *quantiles, distribution.maximum]
            table.add_row(name, *(f"{value:,}" for value in values), f"{mean:,.1f}")
    return table


def _answers(stats: "DatasetStats", columns: Sequence["Stats"]) -> "Table":
    from phi3v_data.report import printable
    from phi3v_data.stats import ranked

    classes = stats.total.classes
    assert classes is not None
    table = _table("answer")
    for name in _names(columns):
        table.add_column(name if len(columns) > 1 else "turns", justify="right")
    table.add_column("")
    order = ranked(classes)
    most = order[0][1]
    for label, number in order[:MAX_ANSWERS_SHOWN]:
        shown = printable(" ".join(label.split())) or "(white space)"
        shown = shown if len(shown) <= 40 else shown[:39] + "…"
        numbers = (f"{(column.labels or {}).get(label, 0):,}" for column in columns)
        bar = "█" * max(1, round(BAR_WIDTH * number / most))
        table.add_row(_escape(shown), *numbers, f"[cyan]{bar}[/]")
    if len(order) > MAX_ANSWERS_SHOWN:
        rest = [label for label, _ in order[MAX_ANSWERS_SHOWN:]]
        numbers = (f"{sum((c.labels or {}).get(label, 0) for label in rest):,}" for c in columns)
        table.add_row(f"{len(rest):,} others", *numbers, "")
    return table


def _names(columns: Sequence["Stats"]) -> list[str]:
    """Heads of columns: file names, with their folders only where two are alike."""
    import os

    from phi3v_data.report import printable

    names = [os.path.basename(column.file) or "total" for column in columns]
    if len(set(names)) < len(names):
        names = [column.file or "total" for column in columns]
    return [_escape(printable(name)) for name in names]


def _table(first_column: str) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    table.add_column(first_column, no_wrap=True)
    return table


def _escape(text: str) -> str:
    """Text of the data is no markup."""
    from rich.markup import escape

    return escape(text)
