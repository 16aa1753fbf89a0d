"""`phi3v-data`: parse, call, print, exit status. Everything else is in the modules it calls.

Imports of the working modules stand inside the commands: `--help` answers at once.
"""

from typing import Any

import click

from phi3v_data.conversion.command import convert_group
from phi3v_data.fix_command import refuse_lone_options, run_fix, with_fix_options
from phi3v_data.input_error import InputError
from phi3v_data.preview_command import preview_command
from phi3v_data.stats_command import stats_command


def _underscored(name: str) -> str:
    """--out_dir and --out-dir are the same option, on every command."""
    return name.replace("-", "_")


CONTEXT: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": _underscored,
    "max_content_width": 100,
}


@click.group(context_settings=CONTEXT)
@click.version_option(package_name="phi3v-data")
def main() -> None:
    """Turn raw data sets into validated shards for fine-tuning Phi-3.5-vision."""


main.add_command(convert_group)
main.add_command(stats_command)
main.add_command(preview_command)


FILES = click.argument(
    "files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False)
)
IMAGES = click.option(
    "--images",
    type=click.Path(exists=True, file_okay=False),
    help="Image root.  [images/ beside each file, else its folder]",
)
ALLOW_MISSING_ANSWER = click.option(
    "--allow_missing_answer", is_flag=True, help="The last turn may lack its answer (test splits)."
)
NUM_CROPS = click.option(
    "--num_crops",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Most crops an image in training (its data.num_crops): how long and thin one may be.",
)
CHECK_WORKERS = click.option(
    "--workers", type=click.IntRange(1), help="Threads that decode images.  [one per core]"
)


@main.command("validate")
@FILES
@IMAGES
@click.option("--select", multiple=True, metavar="CODE", help="Run these rules only, by prefix.")
@click.option("--ignore", multiple=True, metavar="CODE", help="Do not run these, by prefix.")
@click.option(
    "--severity",
    multiple=True,
    metavar="CODE=LEVEL",
    help="error, warning or off, for codes by prefix.",
)
@click.option(
    "--max_errors", type=click.IntRange(1), help="Stop at so many errors.  [look at everything]"
)
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["text", "concise", "json", "sarif", "github"]),
    help="How the report is printed.  [text]",
)
@ALLOW_MISSING_ANSWER
@click.option(
    "--num_crops",
    type=click.IntRange(1),
    help="Most crops an image in training (its data.num_crops): how long and thin one may be.  "
    "[16]",
)
@click.option(
    "--level",
    type=click.Choice(["header", "deep", "full"]),
    help="How closely images are looked at: header (there, of a known format), deep (every "
    "truncated or damaged file), full (every pixel decoded).  [deep]",
)
@click.option("--no_cache", is_flag=True, help="Look at images again that did not change.")
@click.option(
    "--unused", is_flag=True, help="Find image files under the image root that no sample names."
)
@with_fix_options
@CHECK_WORKERS
@click.pass_context
def validate_command(
    context: click.Context,
    files: tuple[str, ...],
    images: str | None,
    select: tuple[str, ...],
    ignore: tuple[str, ...],
    severity: tuple[str, ...],
    max_errors: int | None,
    output_format: str | None,
    allow_missing_answer: bool,
    num_crops: int | None,
    level: str | None,
    no_cache: bool,
    unused: bool,
    fix: bool,
    unsafe_fix: bool,
    in_place: bool,
    out_dir: str | None,
    workers: int | None,
) -> None:
    """Find all that is wrong with conversations files.

    Several FILES are the splits of one data set, that of training first. Every line is parsed and
    every distinct image looked at once. `phi3v-data rules` lists what is looked for.

    \b
      phi3v-data validate train.jsonl val.jsonl
      phi3v-data validate train.jsonl --images /data/images --ignore I104
      phi3v-data validate train.jsonl --severity T101=warning --max_errors 10
      phi3v-data validate train.jsonl --format json | jq .counts
      phi3v-data validate train.jsonl --fix          repairs: train.fixed.jsonl

    \b
    gives
      train.jsonl:17:67: error I101 image 'val/a.jpg' does not exist
         |
      17 | …"conversations": [{"images": ["val/a.jpg"], "user": "What is it?"…
         |                                ^^^^^^^^^^^
         = at: /conversations/0/images/0 of sample 'val-0000000003'
         = help: the image root is images

    --select, --ignore and --severity take codes or their beginnings, also separated by commas.
    [tool.phi3v-data.validate] of the nearest pyproject.toml may hold the same settings; the command
    line wins.

    Exit status: 0 no errors (warnings are counted), 1 errors, 2 wrong usage.
    """
    from pathlib import Path

    from phi3v_data.report import print_report, progress_bar
    from phi3v_data.validate import validate
    from phi3v_data.validate_config import load_config

    _silence_pillow()
    overrides: dict[str, Any] = {
        "select": _codes(select) or None,
        "ignore": _codes(ignore) or None,
        "severity": _levels(severity),
        "max_errors": max_errors,
        "format": output_format,
        "num_crops": num_crops,
        "level": level,
        "cache": False if no_cache else None,
        "unused": unused or None,
    }
    try:
        config = load_config(Path.cwd(), overrides)
        _name_broken_rules()
        if refuse_lone_options(fix=fix, unsafe_fix=unsafe_fix, in_place=in_place, out_dir=out_dir):
            status = run_fix(
                files,
                unsafe_fix=unsafe_fix,
                in_place=in_place,
                out_dir=out_dir,
                images=images,
                rules_for=config.rules_for,
                allow_missing_answer=allow_missing_answer,
                num_crops=config.num_crops,
                workers=workers,
            )
            context.exit(status)
        with progress_bar("validating") as progress:
            report = validate(
                files,
                images=images,
                rules_for=config.rules_for,
                allow_missing_answer=allow_missing_answer,
                num_crops=config.num_crops,
                level=config.level,
                use_cache=config.cache,
                max_errors=config.max_errors,
                num_workers=workers,
                progress=progress,
            )
    except ValueError as error:
        raise InputError(str(error)) from error
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        context.exit(130)
    if report.cache_problem:
        click.echo(
            f"warning: {report.cache_problem}; the next run looks at all images again", err=True
        )
    print_report(report, config.format)
    if not report.is_complete:
        click.echo(
            f"stopped: there are {config.max_errors} errors or more (max_errors); "
            "the rest was not looked at",
            err=True,
        )
    context.exit(report.exit_status)


@main.command("shard")
@FILES
@click.option(
    "--out_dir",
    required=True,
    type=click.Path(),
    help="The directory to make, whole or not at all.",
)
@IMAGES
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
@ALLOW_MISSING_ANSWER
@NUM_CROPS
@CHECK_WORKERS
@click.pass_context
def shard_command(
    context: click.Context,
    files: tuple[str, ...],
    out_dir: str,
    images: str | None,
    shard_size: str,
    drop_invalid: bool,
    overwrite: bool,
    allow_missing_answer: bool,
    num_crops: int,
    workers: int | None,
) -> None:
    """Validate conversations files and write them as Parquet shards for training.

    All FILES go into one directory, in this order: give each split its own. If any sample has an
    error nothing is written, unless --drop_invalid.

    \b
      phi3v-data shard train.jsonl --out_dir shards/train

    \b
    gives
      shards/train/shard-00000.parquet ...   ordinary Parquet, images included
      shards/train/index.arrow               text, sizes and place of every image
      shards/train/manifest.json             counts, hashes, the rules that ran
      shards/train/rejected.jsonl            with --drop_invalid, where something was dropped

    The same command again finds the directory up to date and leaves it alone.

    Exit status: 0 written or up to date, 1 samples have errors or writing failed, 2 wrong usage.
    """
    from phi3v_data.report import count, print_text, progress_bar
    from phi3v_data.shard_writer import write_shards

    _silence_pillow()
    try:
        with progress_bar("sharding") as progress:
            result = write_shards(
                files,
                out_dir,
                images=images,
                shard_bytes=_parse_size("--shard_size", shard_size),
                drop_invalid=drop_invalid,
                overwrite=overwrite,
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
    manifest = result.manifest
    if not result.is_up_to_date and result.report.diagnostics:
        print_text(result.report)
    if manifest is None:
        remedy = "repair them, or leave them out with --drop_invalid"
        if drop_invalid:
            remedy = "no sample is valid"
        click.echo(f"Nothing was written: {remedy}.", err=True)
        context.exit(1)
    if result.is_up_to_date:
        click.echo(f"{out_dir} is up to date: same input, same settings")
    click.echo(
        f"{count(manifest.num_samples, 'sample')}, {count(manifest.num_images, 'image')} "
        f"({_size(manifest.image_bytes)}) in {count(len(manifest.shards), 'shard')} "
        f"({_size(sum(shard.num_bytes for shard in manifest.shards))}): {out_dir}"
    )
    if manifest.num_dropped:
        click.echo(f"{manifest.num_dropped:,} dropped, listed in {out_dir}/rejected.jsonl")


@main.command("verify")
@click.argument("directory", type=click.Path(exists=True, file_okay=False))
@click.pass_context
def verify_command(context: click.Context, directory: str) -> None:
    """Read a shard directory back and compare it with its hashes.

    Every file, every sample's text and every image is looked at; what is damaged is named, down to
    the sample.

    \b
      phi3v-data verify shards/train

    Exit status: 0 all is well, 1 damaged or not a shard directory, 2 wrong usage.
    """
    from phi3v_data.report import count, printable
    from phi3v_data.shard_verify import verify_shards
    from phi3v_data.shards import ShardError, open_shards

    try:
        findings = verify_shards(directory)
        manifest = None if findings else open_shards(directory).manifest
    except ShardError as error:
        raise click.ClickException(str(error)) from error
    if manifest is None:
        for finding in findings:
            click.echo(printable(f"{directory}/{finding.file}: {finding.problem}"))
        click.echo(f"{count(len(findings), 'problem')}: write it again")
        context.exit(1)
    click.echo(
        f"{directory}: {count(manifest.num_samples, 'sample')}, "
        f"{count(manifest.num_images, 'image')} in "
        f"{count(len(manifest.shards), 'shard')}, all as written"
    )


@main.command("rules")
@click.argument("code", required=False)
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["text", "markdown"]),
    default="text",
    show_default=True,
    help="markdown: the page docs/rules.md, of the built-in rules.",
)
def rules_command(code: str | None, output_format: str) -> None:
    """List the rules of `validate`, or explain one.

    \b
      phi3v-data rules
      phi3v-data rules I101
      phi3v-data rules --format markdown

    Codes may be beginnings of codes. Rules of other packages are listed with the built-in ones.
    """
    from phi3v_data.rules import RULES, all_rules, check_codes
    from phi3v_data.rules.page import to_markdown

    _name_broken_rules()
    rules = RULES if output_format == "markdown" else all_rules()
    if code is not None:
        try:
            check_codes((code.upper(),), rules)
        except ValueError as error:
            raise InputError(str(error)) from error
        rules = tuple(rule for rule in rules if rule.code.startswith(code.upper()))
    if output_format == "markdown":
        click.echo(to_markdown(rules), nl=False)
        return
    for rule in rules:
        default = "" if rule.is_default else "off by default"
        if code is None:
            summary = f"{rule.summary} ({default})" if default else rule.summary
            click.echo(f"{rule.code}  {rule.severity:<8} {summary}")
        else:
            traits = ", ".join(filter(None, (rule.severity, default)))
            click.echo(f"{rule.code} {rule.name} ({traits})\n\n{rule.documentation}\n")


@main.command("schema")
def schema_command() -> None:
    """Print the JSON Schema of a line of a conversations file.

    \b
      phi3v-data schema > sample.schema.json
    """
    import json

    from phi3v_data.schema import json_schema

    click.echo(json.dumps(json_schema(), indent=2))


def _name_broken_rules() -> None:
    """Rules of other packages that cannot be used are no reason not to check data."""
    from phi3v_data.rules import broken_rules

    for broken in broken_rules():
        click.echo(f"warning: {broken}", err=True)


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


def _silence_pillow() -> None:
    """What Pillow has to say about a file becomes a finding; its warnings would only repeat it."""
    import warnings

    warnings.filterwarnings("ignore", module=r"PIL\.")
