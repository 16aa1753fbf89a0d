"""`phi3v-data preview`: a page that shows a data set."""

from typing import TYPE_CHECKING

import click

from phi3v_data.input_error import InputError

if TYPE_CHECKING:
    pass


@click.command("preview")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--out", required=True, type=click.Path(dir_okay=False), help="The HTML file to write."
)
@click.option(
    "--images",
    type=click.Path(exists=True, file_okay=False),
    help="Image root.  [images/ beside each file, else its folder]",
)
@click.option(
    "--max_samples",
    type=click.IntRange(1),
    default=10_000,
    show_default=True,
    help="Show no more than this: an even part, and samples with findings.",
)
@click.option(
    "--max_mb",
    type=click.FloatRange(0, min_open=True),
    default=50,
    show_default=True,
    help="Most megabytes of the page: images get smaller, then fewer.",
)
@click.option("--select", multiple=True, metavar="CODE", help="Run these rules only, by prefix.")
@click.option("--ignore", multiple=True, metavar="CODE", help="Do not run these, by prefix.")
@click.option(
    "--allow_missing_answer", is_flag=True, help="The last turn may lack its answer (test splits)."
)
@click.option(
    "--num_crops",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Most crops an image in training (its data.num_crops): how long and thin one may be.",
)
@click.option(
    "--workers", type=click.IntRange(1), help="Threads that decode images.  [one per core]"
)
@click.option("--open", "open_page", is_flag=True, help="Show the page in the browser.")
@click.pass_context
def preview_command(
    context: click.Context,
    files: tuple[str, ...],
    out: str,
    images: str | None,
    max_samples: int,
    max_mb: float,
    select: tuple[str, ...],
    ignore: tuple[str, ...],
    allow_missing_answer: bool,
    num_crops: int,
    workers: int | None,
    open_page: bool,
) -> None:
    """Write a page that shows a data set.

    Images, conversations, findings and distributions in one HTML file, to be opened in a browser or
    sent to somebody: it needs no server, no network and no other file. Several FILES are the splits
    of one data set. All lines are checked, as by `validate`; what is wrong with a sample stands in
    it.

    \b
      phi3v-data preview train.jsonl val.jsonl --out preview.html
      phi3v-data preview train.jsonl --images /data/images --out preview.html --open
      phi3v-data preview train.jsonl --out small.html --max_samples 500 --max_mb 5

    In it: filters by file, rule, answer, number of images, length of text and image size (click a
    bar), search, and the keyboard (?). The page says what it left out. --ignore I leaves out the
    full decoding of all images, which takes long for many.

    Exit status: 0 written, whatever was found; 1 writing failed, 2 wrong usage.
    """
    import warnings

    from phi3v_data.preview import write_preview
    from phi3v_data.progress_bars import progress_bars
    from phi3v_data.report import count

    # What Pillow has to say about a file becomes a finding; its warnings would only repeat it.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        with progress_bars(is_bytes=False) as progress:
            result = write_preview(
                files,
                out,
                images=images,
                max_samples=max_samples,
                max_mb=max_mb,
                select=_codes(select),
                ignore=_codes(ignore),
                allow_missing_answer=allow_missing_answer,
                num_crops=num_crops,
                num_workers=workers,
                progress=progress,
            )
    except ValueError as error:
        raise InputError(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error}; nothing was written") from error
    except KeyboardInterrupt:
        click.echo("interrupted; nothing was written", err=True)
        context.exit(130)
    findings = sum(result.counts.values())
    click.echo(
        f"{count(result.num_samples, 'sample')}, {count(result.num_images, 'image')}, "
        f"{count(findings, 'finding')}: {out} ({result.num_bytes / 1e6:.1f} MB)"
    )
    for note in result.notes:
        click.echo(f"not all is there: {note}")
    if open_page:
        click.launch(out)


def _codes(values: tuple[str, ...]) -> list[str]:
    """`("I,T101", "P")` -> `["I", "T101", "P"]`."""
    return [code.strip() for value in values for code in value.split(",")]
