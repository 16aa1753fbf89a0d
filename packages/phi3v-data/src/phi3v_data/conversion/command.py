"""`phi3v-data convert NAME SOURCE`: a command for every converter, with that converter's options.

The commands are made when they are asked for: of installed converters by name, and of anyone's by
`module:object`.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from phi3v_data.input_error import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from phi3v_data.conversion.converter_options import ConverterOption
    from phi3v_data.conversion.dry_run import Preview, PreviewSample
    from phi3v_data.convert import ConversionResult


class ConvertGroup(click.Group):
    """Converters as commands."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take the converter's name from wherever it stands: options may come first."""
        if args and args[0].startswith("-"):
            known = set(self.list_commands(ctx))
            for position, arg in enumerate(args):
                is_object = ":" in arg and "://" not in arg and not arg.startswith("-")
                if arg in known or (is_object and "=" not in arg):
                    args = [arg, *args[:position], *args[position + 1 :]]
                    break
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of the installed converters."""
        from phi3v_data.converters import list_converters

        return list(list_converters())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        """The command of a converter."""
        from phi3v_data.converters import load_converter

        if os.getcwd() not in sys.path:  # for module:object; a console script does not look there
            sys.path.insert(0, os.getcwd())
        try:
            return _make_command(cmd_name, load_converter(cmd_name))
        except ValueError as error:
            raise InputError(str(error)) from error

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str, click.Command, list[str]]:
        """Names are not options: `-` and `_` in them differ."""
        return args[0], self.get_command(ctx, args[0]), args[1:]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the converters; one that is broken does not hide the others."""
        from phi3v_data.conversion.converter_options import summary
        from phi3v_data.converters import load_converter

        rows: list[tuple[str, str]] = []
        for name in self.list_commands(ctx):
            try:
                rows.append((name, summary(load_converter(name))))
            except ValueError as error:
                rows.append((name, f"({error})"))
        rows.append(("module:object", "Your own class or function; see docs/custom-converters.md."))
        with formatter.section("Converters"):
            formatter.write_dl(rows)


@click.group(
    "convert",
    cls=ConvertGroup,
    invoke_without_command=True,
    subcommand_metavar="CONVERTER SOURCE --out_dir DIR [OPTIONS]",
)
@click.option("--list", "list_only", is_flag=True, help="List the installed converters.")
@click.pass_context
def convert_group(context: click.Context, list_only: bool) -> None:
    """Convert a raw data set to images and conversations JSONL.

    CONVERTER is an installed one (see below) or your own, module:object, looked for in the current
    folder too. SOURCE is the data set's folder, or a .tar.gz of it; it and the output may be at an
    address (s3://...).

    \b
      phi3v-data convert ucf101 UCF101_subset --out_dir converted
      phi3v-data convert docvqa docvqa --out_dir converted --dry_run
      phi3v-data convert my_module:MyConverter raw --out_dir converted --set lang=en
      phi3v-data convert ucf101 --help       the options of a converter

    \b
    gives
      converted/images/train/Archery/v_Archery_g01_c01.0.jpg ...
      converted/ucf101_train.jsonl  ucf101_val.jsonl  ucf101_test.jsonl
      converted/rejected.jsonl      where something was rejected, with item and reason
      converted/dataset_card.md     counts, labels, source and licence, for people
      converted/manifest.json       settings, counts and hashes
      converted/shards/train ...    with --shards

    What was interrupted, even by kill -9, continues when the same command is run again. The output
    is the same bytes whatever the number of workers.

    Exit status: 0 done (rejected items are counted), 1 not one sample came out, the converter
    failed under --on_error stop, or the machine failed, 2 wrong usage, 130 Ctrl-C.
    """
    from phi3v_data.converters import list_converters

    if list_only:
        for name, target in list_converters().items():
            click.echo(f"{name}\t{target}")
        context.exit(0)
    if context.invoked_subcommand is None:
        raise click.UsageError("missing CONVERTER; see --help for an example")


RUN_OPTIONS: list[click.Parameter] = [
    click.Argument(["source"], required=False, type=click.Path()),
    click.Option(["--out_dir"], type=click.Path(), help="Where the output goes; made if need be."),
    click.Option(
        ["--split", "splits"],
        multiple=True,
        metavar="NAME",
        help="Convert this split only. May be repeated.  [all]",
    ),
    click.Option(["--limit"], type=click.IntRange(1), help="Stop after the first LIMIT samples."),
    click.Option(
        ["--dry_run"],
        is_flag=True,
        help="Show what would be read and the first three samples; write nothing.",
    ),
    click.Option(["--workers"], type=click.IntRange(0), help="Processes; 0: none.  [one per core]"),
    click.Option(
        ["--engine"],
        type=click.Choice(["local", "ray"]),
        default="local",
        show_default=True,
        help="Processes of this machine, or tasks of Ray.",
    ),
    click.Option(
        ["--address"], help="With --engine ray: the cluster.  [RAY_ADDRESS, or one made here]"
    ),
    click.Option(
        ["--on_error"],
        type=click.Choice(["reject", "stop"]),
        default="reject",
        show_default=True,
        help="Where the converter itself raises: reject the item, or stop.",
    ),
    click.Option(
        ["--overwrite"], is_flag=True, help="Remove an earlier conversion and start anew."
    ),
    click.Option(
        ["--shards"],
        is_flag=True,
        help="Then validate each split and write it as shards: OUT_DIR/shards/SPLIT.",
    ),
    click.Option(
        ["--set", "settings"],
        multiple=True,
        metavar="NAME=VALUE",
        help="Any setting of the converter; the value is JSON, or else text. May be repeated.",
    ),
]

SEED = click.Option(
    ["--seed"], type=int, help="Nothing is drawn by this converter: it makes no difference."
)


def _make_command(name: str, found: object) -> click.Command:
    from phi3v_data.conversion.converter_options import converter_options, summary

    taken = {parameter.name for parameter in RUN_OPTIONS}
    options = [option for option in converter_options(found) if option.name not in taken]
    own = [_click_option(option) for option in options]
    if not any(option.name == "seed" for option in options):
        own.append(SEED)

    def callback(**values: Any) -> None:
        context = click.get_current_context()
        given = {
            option.name: values[option.name]
            for option in options
            if context.get_parameter_source(option.name) is not click.core.ParameterSource.DEFAULT
        }
        _run(context, name, given, values)

    return click.Command(
        name,
        callback=callback,
        params=[*RUN_OPTIONS, *own],
        help=f"{summary(found) or f'Convert by {name}.'}\n\n`phi3v-data convert --help` says what "
        f"comes out.\n\n\b\n  phi3v-data convert {name} SOURCE --out_dir converted",
        context_settings={"max_content_width": 100},
    )


def _click_option(option: "ConverterOption") -> click.Option:
    kind: Any = click.Choice(option.type) if isinstance(option.type, tuple) else option.type
    name = f"--{option.name}"
    if option.type is bool:
        return click.Option(
            [f"{name}/--no_{option.name}"],
            default=bool(option.default),
            show_default=True,
            help=option.help,
        )
    return click.Option(
        [name, option.name],
        type=kind,
        default=option.default,
        show_default=option.default is not None,
        help=option.help,
    )


def _run(
    context: click.Context, name: str, given: dict[str, object], values: dict[str, Any]
) -> None:
    from phi3v_data.addresses import is_address
    from phi3v_data.conversion.dry_run import dry_run
    from phi3v_data.convert import ConverterError, convert
    from phi3v_data.converters import get_converter

    source, out_dir = values["source"], values["out_dir"]
    required = {"SOURCE": source} | ({} if values["dry_run"] else {"--out_dir": out_dir})
    for what, value in required.items():
        if value is None:
            raise click.UsageError(f"missing {what}; see --help for an example")
    splits = list(values["splits"]) or None
    if values["shards"] and is_address(out_dir):
        raise InputError(f"--shards: {out_dir} is an address; shards are written on this machine")
    try:
        converter = get_converter(name, **given, **_parse_settings(values["settings"]))
        if values["dry_run"]:
            _print_preview(dry_run(converter, source, splits=splits), name, source)
            return
        result = convert(
            converter,
            source,
            out_dir,
            splits=splits,
            limit=values["limit"],
            on_error=values["on_error"],
            num_workers=values["workers"],
            engine=values["engine"],
            ray_address=values["address"],
            overwrite=values["overwrite"],
            progress=sys.stderr.isatty(),
        )
        _print_conversion(result)
        is_sharded = not values["shards"] or _write_shards(result, out_dir, values)
    except ValueError as error:
        raise InputError(str(error)) from error
    except ConverterError as error:
        raise click.ClickException(f"{error}\nwhat is finished is kept, run again") from error
    except OSError as error:
        raise click.ClickException(f"{error}; what is finished is kept, run again") from error
    except KeyboardInterrupt as error:
        click.echo(str(error) or "interrupted; run the same command again", err=True)
        context.exit(130)
    if not any(result.counts.values()) or not is_sharded:
        context.exit(1)


def _write_shards(result: "ConversionResult", out_dir: str, values: dict[str, Any]) -> bool:
    """Write the splits that have samples as shards; whether all were valid."""
    from phi3v_data.shard_command import shard_splits

    files = {s: str(path) for s, path in result.files.items() if result.counts[s]}
    shards = os.path.join(out_dir, "shards")
    workers: int | None = values["workers"]
    return shard_splits(files, shards, workers=workers, overwrite=values["overwrite"])


def _parse_settings(settings: Sequence[str]) -> dict[str, object]:
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

    from phi3v_data.addresses import is_address
    from phi3v_data.report_words import count

    console = Console(soft_wrap=True, highlight=False)
    title = count(result.num_items, "item")
    table = Table("split", "samples", "file", title=title, title_justify="left")
    table.columns[1].justify = "right"
    for split, number in result.counts.items():
        table.add_row(split, f"{number:,}", Text(str(result.files[split]).rpartition("/")[2]))
    console.print(table)
    if result.rejected:
        rejected = Table("rejected because", "count", title_justify="left")
        rejected.columns[1].justify = "right"
        for reason, number in result.rejected.items():
            rejected.add_row(Text(reason), f"{number:,}", style="red")
        console.print(rejected)
        console.print(Text(f"Each is listed in {result.rejected_file}"))
    for fault in result.faults[:3]:
        _print_fault(console, fault.item, fault.detail, fault.traceback)
    if result.num_reused:
        was = "was" if result.num_reused == 1 else "were"
        console.print(f"{count(result.num_reused, 'item')} {was} finished by an earlier run.")
    # Test splits may lack answers: they are validated with an option, and apart.
    files = [
        str(path)
        for split, path in result.files.items()
        if result.counts[split] and not split.startswith("test")
    ]
    if files and not is_address(files[0]):
        console.print(Text(f"Next: phi3v-data validate {shlex.join(files)}"))


def _print_fault(console: "Console", item: str, detail: str, traceback: Sequence[str]) -> None:
    from rich.text import Text

    from phi3v_data.report import printable

    console.print(Text(f"\nThe converter raised, first for {printable(item)}:", style="bold"))
    for line in traceback:
        console.print(Text(f"  {printable(line)}"))
    console.print(Text(f"  {printable(detail)}", style="red"))


def _print_preview(preview: "Preview", name: str, source: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from phi3v_data.report import printable

    console = Console(highlight=False)
    title = f"{preview.num_files:,} files, {preview.num_bytes / 1e6:,.1f} MB"
    table = Table("split", "items", title=title, title_justify="left")
    table.columns[1].justify = "right"
    for split, count in preview.num_items.items():
        table.add_row(split, f"{count:,}")
    console.print(table)
    for sample in preview.samples:
        _print_sample(console, sample)
    for item, rejection in preview.rejections[:10]:
        text = f"rejected ({rejection.reason}) {item}: {rejection.detail}"
        console.print(Text(printable(text), style="red"))
    if len(preview.rejections) > 10:
        console.print(f"and {len(preview.rejections) - 10:,} more rejected", style="red")
    command = f"phi3v-data convert {name} {source} --out_dir converted"
    tried = f"Of {sum(preview.num_items.values()):,} items {preview.num_tried:,} were tried"
    console.print(Text(f"{tried}; nothing was written. To convert: {command}"), soft_wrap=True)


def _print_sample(console: "Console", found: "PreviewSample") -> None:
    from rich.panel import Panel
    from rich.text import Text

    from phi3v_data.report import printable

    images = iter(found.images)
    text = Text()
    for turn in found.sample.conversations:
        for _ in turn.images:
            image = next(images)
            size = "no picture" if image.size_wh is None else "{}x{}".format(*image.size_wh)
            text.append(f"{printable(image.name)}  {size}, {image.num_bytes:,} bytes\n", "dim")
        for who, words in (("user", turn.user), ("assistant", turn.assistant)):
            if words is not None:
                lines = [printable(line) for line in words.split("\n")]
                text.append(f"{who:<10}", "bold").append("\n          ".join(lines) + "\n")
        for answer in (turn.answers or ())[1:]:
            text.append("or        ", "bold").append(printable(answer) + "\n")
    text.rstrip()
    title = Text(printable(f"{found.split}: {found.sample.id}"))
    console.print(Panel(text, title=title, title_align="left"))
