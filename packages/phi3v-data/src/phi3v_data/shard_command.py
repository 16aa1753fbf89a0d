"""`phi3v-data shard` and `phi3v-data verify`: conversations files to shards, and shards checked."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from phi3v_data.input_error import InputError
from phi3v_data.rule_options import load_options, with_rule_options

if TYPE_CHECKING:
    from phi3v_data.shard_verify import Verified
    from phi3v_data.shard_writer import ShardResult


@click.command("shard")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--out_dir",
    required=True,
    type=click.Path(),
    help="The directory to make, whole or not at all.",
)
@click.option(
    "--images",
    type=click.Path(exists=True, file_okay=False),
    help="Image root.  [images/ beside each file, else its folder]",
)
@click.option(
    "--shard_size",
    default="128MiB",
    show_default=True,
    help="Begin a new file at this size: bytes, or with kB, MB, GB, KiB, MiB, GiB.",
)
@click.option(
    "--drop_invalid",
    is_flag=True,
    help="Leave out samples with errors, and list them in rejected.jsonl.",
)
@click.option("--overwrite", is_flag=True, help="Replace a shard directory made from other input.")
@with_rule_options
@click.option("--workers", type=click.IntRange(1), help="Processes.  [one per core]")
@click.pass_context
def shard_command(
    context: click.Context,
    files: tuple[str, ...],
    out_dir: str,
    images: str | None,
    shard_size: str,
    drop_invalid: bool,
    overwrite: bool,
    workers: int | None,
    **options: Any,
) -> None:
    """Validate conversations files and write them as Parquet shards for training.

    All FILES go into one directory, in this order: give each split its own. Ids are unique among
    them. If any sample has an error nothing is written, unless --drop_invalid. The rules, their
    severities and [tool.phi3v-data.validate] of pyproject.toml are those of `phi3v-data validate`,
    and so is the verdict.

    \b
      phi3v-data shard train.jsonl --out_dir shards/train
      phi3v-data shard a.jsonl b.jsonl --out_dir shards/train --shard_size 256MiB --drop_invalid

    \b
    gives
      shards/train/shard-00000.parquet ...   ordinary Parquet, images included
      shards/train/index.arrow               text, sizes and place of every image
      shards/train/manifest.json             counts, hashes, the rules that ran
      shards/train/rejected.jsonl            with --drop_invalid, where something was dropped

    The same command again finds the directory up to date and leaves it alone. What was interrupted,
    even by kill -9, continues when the same command is run again. The bytes are the same whatever
    the number of workers.

    Exit status: 0 written or up to date, 1 samples have errors or writing failed, 2 wrong usage,
    130 Ctrl-C.
    """
    from phi3v_data.progress_bars import progress_bars
    from phi3v_data.shard_writer import write_shards

    try:
        config = load_options(options)
        with progress_bars() as progress:
            result = write_shards(
                files,
                out_dir,
                images=images,
                rules_for=config.rules_for,
                level=config.level,
                use_cache=config.cache,
                max_errors=config.max_errors,
                shard_bytes=_parse_size("--shard_size", shard_size),
                drop_invalid=drop_invalid,
                overwrite=overwrite,
                allow_missing_answer=options["allow_missing_answer"],
                num_crops=config.num_crops,
                num_workers=workers,
                progress=progress,
            )
    except ValueError as error:
        raise InputError(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error}; what is finished is kept, run again") from error
    except KeyboardInterrupt as error:
        click.echo(f"interrupted; {error}" if str(error) else "interrupted", err=True)
        context.exit(130)
    if not print_result(result, out_dir, drop_invalid=drop_invalid):
        context.exit(1)


def shard_splits(
    files: Mapping[str, str], out_dir: str, *, workers: int | None, overwrite: bool
) -> bool:
    """Write a shard directory for each split, as `shard` would; whether all were written.

    Args:
        files: split → its conversations file. Those of test splits may lack answers.
        out_dir: the folder of the directories: `train` in it, `val`, ...
        workers: processes; by default one a core.
        overwrite: replace directories that were made from other input.

    Raises:
        ValueError: as `write_shards`.
        OSError: as `write_shards`.
    """
    from pathlib import Path

    from phi3v_data.progress_bars import progress_bars
    from phi3v_data.report import printable
    from phi3v_data.shard_writer import write_shards
    from phi3v_data.validate_config import load_config

    config = load_config(Path.cwd())
    is_written = True
    for split, file in files.items():
        target = f"{out_dir}/{split}"
        with progress_bars() as progress:
            result = write_shards(
                [file],
                target,
                rules_for=config.rules_for,
                level=config.level,
                use_cache=config.cache,
                allow_missing_answer=split.startswith("test"),
                num_crops=config.num_crops,
                overwrite=overwrite,
                num_workers=workers,
                progress=progress,
            )
        if not print_result(result, target, drop_invalid=False):
            is_written = False
            command = f"phi3v-data shard {file} --out_dir {target} --drop_invalid"
            click.echo(printable(f"To write the others: {command}"), err=True)
    return is_written


def print_result(result: "ShardResult", out_dir: str, *, drop_invalid: bool) -> bool:
    """Say what was written, or why nothing was; whether the directory is there."""
    from phi3v_data.report import count, print_text

    manifest = result.manifest
    if not result.is_up_to_date and result.report.diagnostics:
        print_text(result.report)
    if manifest is None:
        click.echo(f"Nothing was written: {_remedy(result, drop_invalid)}.", err=True)
        return False
    if result.is_up_to_date:
        click.echo(f"{out_dir} is up to date: same input, same settings")
    if result.num_kept:
        was = "was" if result.num_kept == 1 else "were"
        click.echo(f"{count(result.num_kept, 'shard')} {was} finished by an earlier run")
    click.echo(
        f"{count(manifest.num_samples, 'sample')}, {count(manifest.num_images, 'image')} "
        f"({_size(manifest.image_bytes)}) in {count(len(manifest.shards), 'shard')} "
        f"({_size(sum(shard.num_bytes for shard in manifest.shards))}): {out_dir}"
    )
    if manifest.num_dropped:
        click.echo(f"{manifest.num_dropped:,} dropped, listed in {out_dir}/rejected.jsonl")
    return True


def _remedy(result: "ShardResult", drop_invalid: bool) -> str:
    if result.undroppable:
        codes = ", ".join(dict.fromkeys(found.code for found in result.undroppable))
        return f"{codes} is about the data set as a whole, and no sample can be dropped for it"
    if not result.report.is_complete:
        return "it stopped at so many errors (max_errors)"
    if drop_invalid:
        return "no sample is valid"
    return "repair them, or leave them out with --drop_invalid"


@click.command("verify")
@click.argument(
    "directories", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False)
)
@click.option(
    "--sample",
    "num_sampled",
    type=click.IntRange(0),
    help="Read back so many samples of every shard, spread evenly.  [all]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def verify_command(
    context: click.Context, directories: tuple[str, ...], num_sampled: int | None, as_json: bool
) -> None:
    """Read shard directories back and compare them with what their manifests say.

    The hash of every file and the place of every image are compared; then samples are read as a
    training run reads them, and compared with the Parquet rows. What is damaged is named, down to
    the sample.

    \b
      phi3v-data verify shards/train
      phi3v-data verify shards/* --sample 100
      phi3v-data verify shards/train --json | jq .directories[0].findings

    Exit status: 0 all is well, 1 damaged or not a shard directory, 2 wrong usage.
    """
    from phi3v_data.progress_bars import progress_bars
    from phi3v_data.shard_verify import verify

    try:
        with progress_bars() as progress:
            results = [
                verify(path, num_sampled=num_sampled, progress=progress) for path in directories
            ]
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        context.exit(130)
    if as_json:
        from dataclasses import asdict

        from phi3v_data.report_words import printable_json

        click.echo(printable_json({"directories": [asdict(result) for result in results]}))
    else:
        for result in results:
            _print_verified(result)
    if any(result.findings for result in results):
        context.exit(1)


def _print_verified(result: "Verified") -> None:
    from phi3v_data.report import count, printable

    if not result.findings:
        read = "" if result.num_read == result.num_samples else f" ({result.num_read:,} read back)"
        click.echo(
            f"{result.directory}: {count(result.num_samples, 'sample')}, "
            f"{count(result.num_images, 'image')} in "
            f"{count(result.num_shards, 'shard')}, all as written{read}"
        )
        return
    if not result.findings[0].file:  # there is nothing to compare with
        problem = result.findings[0].problem
        click.echo(printable(f"Error: {result.directory}: {problem}"), err=True)
        return
    for finding in result.findings:
        click.echo(printable(f"{result.directory}/{finding.file}: {finding.problem}"))
    more = "" if result.num_findings == len(result.findings) else ", the rest not named"
    click.echo(f"{count(result.num_findings, 'problem')}{more}: write it again")


def _parse_size(option: str, text: str) -> int:
    """`128MiB` -> 134217728."""
    import re

    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
    units |= {"kib": 2**10, "mib": 2**20, "gib": 2**30}
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)\s*", text.lower())
    if not match or match[2] not in units or float(match[1]) * units[match[2]] < 1:
        raise click.UsageError(f"{option}: expected a size such as 128MiB, got {text!r}")
    return int(float(match[1]) * units[match[2]])


def _size(num_bytes: int) -> str:
    """134217728 -> `128.0 MiB`."""
    value, unit = float(num_bytes), "bytes"
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{num_bytes} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
