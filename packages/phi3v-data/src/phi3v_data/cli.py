"""`phi3v-data`: parse, call, print, exit status. Everything else is in the modules it calls.

Imports of the working modules stand inside the commands: `--help` answers at once.
"""

from typing import Any

import click

from phi3v_data.cat_command import cat_command
from phi3v_data.conversion.command import convert_group
from phi3v_data.fix_command import refuse_lone_options, run_fix, with_fix_options
from phi3v_data.input_error import InputError
from phi3v_data.preview_command import preview_command
from phi3v_data.rule_options import load_options, with_rule_options
from phi3v_data.shard_command import shard_command, verify_command
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
main.add_command(shard_command)
main.add_command(verify_command)
main.add_command(cat_command)


FILES = click.argument(
    "files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False)
)
IMAGES = click.option(
    "--images",
    type=click.Path(exists=True, file_okay=False),
    help="Image root.  [images/ beside each file, else its folder]",
)
CHECK_WORKERS = click.option(
    "--workers", type=click.IntRange(1), help="Threads that decode images.  [one per core]"
)


@main.command("validate")
@FILES
@IMAGES
@with_rule_options
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["text", "concise", "json", "sarif", "github"]),
    help="How the report is printed.  [text]",
)
@with_fix_options
@CHECK_WORKERS
@click.pass_context
def validate_command(
    context: click.Context,
    files: tuple[str, ...],
    images: str | None,
    output_format: str | None,
    fix: bool,
    unsafe_fix: bool,
    in_place: bool,
    out_dir: str | None,
    workers: int | None,
    **options: Any,
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
    from phi3v_data.progress_bars import progress_bar
    from phi3v_data.report import print_report
    from phi3v_data.validate import validate

    try:
        config = load_options(options, output_format)
        if refuse_lone_options(fix=fix, unsafe_fix=unsafe_fix, in_place=in_place, out_dir=out_dir):
            status = run_fix(
                files,
                unsafe_fix=unsafe_fix,
                in_place=in_place,
                out_dir=out_dir,
                images=images,
                rules_for=config.rules_for,
                allow_missing_answer=options["allow_missing_answer"],
                num_crops=config.num_crops,
                workers=workers,
            )
            context.exit(status)
        with progress_bar("validating") as progress:
            report = validate(
                files,
                images=images,
                rules_for=config.rules_for,
                allow_missing_answer=options["allow_missing_answer"],
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
