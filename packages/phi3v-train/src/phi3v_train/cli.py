"""`phi3v-train`: parse, call, print, exit status. Everything else is in the modules it calls.

Imports of the working modules stand inside the commands: `--help` answers at once, and a
configuration error shows before torch or transformers are loaded.

Exit status: 0 done; 1 it can't be done, one line says why; 2 the command line is wrong.
"""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, ParamSpec, TypeVar

import click

from phi3v_train.recipe_flags import RecipeFlags, with_recipe_flags

if TYPE_CHECKING:
    from rich.console import Console

CONTEXT = {
    "help_option_names": ["-h", "--help"],
    # --out_dir and --out-dir are the same option, on every command.
    "token_normalize_func": lambda token: token.replace("-", "_"),
    "max_content_width": 100,
}

P = ParamSpec("P")
R = TypeVar("R")


def _one_line_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Show a caller's mistake as `Error: …`; anything else is our bug and keeps its traceback."""

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (ValueError, OSError) as error:
            if click.get_current_context().find_root().params["traceback"]:
                raise
            raise click.ClickException(" ".join(str(error).split())) from error

    return guarded


@click.group(context_settings=CONTEXT)
@click.option("--traceback", is_flag=True, help="Show where in the program an error arose.")
@click.version_option(package_name="phi3v-train")
def main(traceback: bool) -> None:
    """Fine-tune Phi-3.5-vision on images and video, and evaluate the result.

    \b
    A first run, without a download:
      phi3v-train init tiny models/tiny
      phi3v-train launch model=models/tiny output_dir=runs/first data.train=shards/train
      phi3v-train eval --model runs/first/model --data shards/val
      phi3v-train generate --model runs/first/model --image a.jpg --prompt "What is it?"

    Shards are made by phi3v-data.
    """


@main.group()
def init() -> None:
    """Make a model folder to start from."""


@init.command("tiny")
@click.argument("out_dir", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True, help="Of the random weights.")
@_one_line_errors
def init_tiny_command(out_dir: Path, seed: int) -> None:
    """Write a tiny random Phi-3.5-vision to the new folder OUT.

    It has the shape of the real model (CLIP tower, projector, decoder, tokenizer with the same
    special tokens) in about 300,000 parameters, and knows nothing: for demos and tests on a
    CPU. OUT is an ordinary Hugging Face folder.

    \b
      phi3v-train init tiny models/tiny
    """
    from phi3v_train.tiny import init_tiny

    model = init_tiny(out_dir, seed=seed)
    click.echo(
        f"{model.path}: tiny Phi-3.5-vision, {model.num_parameters:,} parameters, "
        f"{model.vocab_size} tokens"
    )


_nproc_option = click.option(
    "--nproc", type=click.IntRange(1), help="Processes, one per device.  [default: 1]"
)


@main.command("launch")
@click.argument("arguments", metavar="[CONFIG] [KEY=VALUE]...", nargs=-1)
@_nproc_option
@click.option(
    "--nnodes",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Machines; run the same command on each.",
)
@click.option("--node_rank", type=click.IntRange(0), help="With --nnodes: which one this is.")
@click.option(
    "--rdzv_endpoint", metavar="HOST:PORT", help="With --nnodes: a free port of machine 0."
)
@click.option(
    "--max_restarts",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Times to start again, from the newest checkpoint, after a process failed.",
)
@click.option("--resume", is_flag=True, help="Refuse to start without a checkpoint to go on from.")
@click.option("--overwrite", is_flag=True, help="Remove an earlier run in output_dir, start anew.")
@click.option("--eval_before", is_flag=True, help="The same as eval.before=true.")
@click.option("--dry_run", is_flag=True, help="Show what would run, and run nothing.")
@with_recipe_flags
@_one_line_errors
def launch_command(
    arguments: tuple[str, ...],
    nproc: int | None,
    nnodes: int,
    node_rank: int | None,
    rdzv_endpoint: str | None,
    max_restarts: int,
    resume: bool,
    overwrite: bool,
    eval_before: bool,
    dry_run: bool,
    recipe: RecipeFlags,
) -> None:
    """Train as the YAML file CONFIG says, or by its defaults.

    KEY=VALUE sets a value on top of the file; `model`, `output_dir` and `data.train` must be set
    in one of the two. Relative paths are relative to the current folder.

    \b
      phi3v-train launch ucf101.yaml
      phi3v-train launch ucf101.yaml optim.learning_rate=1e-5 method.name=lora
      phi3v-train launch ucf101.yaml --nproc 8        # one process per GPU
      phi3v-train launch ucf101.yaml --nproc 8 --nnodes 2 --node_rank 0 --rdzv_endpoint host0:29400
      phi3v-train launch ucf101.yaml --dry_run        # resolved config, rows, steps, parameters

    The options from --task on are those of the cookbook's scripts: `launch --task ucf101
    --data_dir converted --use_lora` validates and shards the JSONL itself, into a cache.

    Checkpoints, log.jsonl, eval_before.json and eval_after.json, and the trained model/ or
    adapter/ go to output_dir. Ctrl-C, SIGTERM and SIGUSR1 finish the step and save a checkpoint;
    the same command then goes on from it. Exit status: 0 finished, 128 + n ended by signal n.

    \b
    Keys that matter most:
      method.name                full | lora | qlora
      method.freeze              [vision, projector, llm]
      data.eval                  shard directory to evaluate on
      data.num_crops             crops an image is cut into: 4 for video, 16 for documents
      data.max_tokens_per_row    lower it when memory runs out
      optim.learning_rate        4e-5
      train.num_epochs           1
      train.global_batch_size    16 samples a step, over all devices
      checkpoint.every_steps     none: only at the end
    """
    config_path, overrides = _split_arguments(arguments)
    if recipe.is_any_given:
        overrides = _recipe_overrides(recipe, overrides, has_config=config_path is not None)
    if eval_before:
        overrides = (*overrides, "eval.before=true")
    if dry_run:
        _show_dry_run(
            config_path,
            overrides,
            nproc=nproc,
            nnodes=nnodes,
            node_rank=node_rank,
            rdzv_endpoint=rdzv_endpoint,
        )
        return

    from phi3v_train.launch import launch

    try:
        status = launch(
            config_path,
            overrides,
            nproc=nproc,
            nnodes=nnodes,
            node_rank=node_rank,
            rdzv_endpoint=rdzv_endpoint,
            resume=resume,
            overwrite=overwrite,
            max_restarts=max_restarts,
        )
    except KeyboardInterrupt:  # before the first step, or for the second time
        status = 130
    sys.exit(status)


def _recipe_overrides(
    recipe: RecipeFlags, own: tuple[str, ...], *, has_config: bool
) -> tuple[str, ...]:
    from phi3v_train.recipe_data import recipe_overrides

    has_gpu = False
    if recipe.task is not None:  # only then does it matter, and torch takes seconds
        import torch

        has_gpu = torch.cuda.is_available()
    return recipe_overrides(recipe, own, has_config=has_config, has_gpu=has_gpu, say=_say)


def _say(text: str) -> None:
    """A sentence on standard error, from one process of a group."""
    from phi3v_train.rank_place import rank_place

    if rank_place(os.environ).rank == 0:
        click.echo(text, err=True)


def _split_arguments(arguments: tuple[str, ...]) -> tuple[str | None, tuple[str, ...]]:
    """The configuration file, if the first argument is one, and the overrides."""
    if arguments and ("=" not in arguments[0] or Path(arguments[0]).is_file()):
        return arguments[0], arguments[1:]
    return None, arguments


def _show_dry_run(
    config_path: str | None,
    overrides: tuple[str, ...],
    *,
    nproc: int | None,
    nnodes: int,
    node_rank: int | None,
    rdzv_endpoint: str | None,
) -> None:
    from phi3v_train.config import dump_config, load_config
    from phi3v_train.launch import check_crew

    config = load_config(config_path, overrides)
    crew = check_crew(
        config,
        os.environ,
        nproc=nproc,
        nnodes=nnodes,
        node_rank=node_rank,
        rdzv_endpoint=rdzv_endpoint,
    )
    click.echo(dump_config(config))

    from phi3v_train.trainer import describe

    describe(config, world_size=crew.world_size if crew is not None else 1)


_model_option = click.option(
    "--model",
    required=True,
    type=click.Path(path_type=Path),
    help="Hugging Face model folder; or a run, or an adapter folder.",
)
_adapter_option = click.option(
    "--adapter", type=click.Path(path_type=Path), help="LoRA adapter folder, or run, to put on."
)
_device_option = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
)


def _max_new_tokens_option(default: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    return click.option(
        "--max_new_tokens",
        type=click.IntRange(1),
        default=default,
        show_default=True,
        help="Longest answer, in tokens.",
    )


@main.command("eval")
@_model_option
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="Shard directory, or conversations in a .jsonl file.",
)
@_adapter_option
@click.option(
    "--out_dir", type=click.Path(path_type=Path), help="Where predictions and eval.json go."
)
@click.option(
    "--num_crops",
    type=click.IntRange(1),
    help="Crops an image is cut into; use what the model was trained with.  [default: what the "
    "run was trained with, else 16]",
)
@_max_new_tokens_option(64)
@click.option(
    "--metric",
    type=click.Choice(["accuracy", "anls"]),
    help="The score.  [default: accuracy; anls where --anls is given]",
)
@click.option(
    "--anls",
    type=click.Choice(["official", "recipe"]),
    help="Score by ANLS: upper and lower case equal (official), or not (recipe).",
)
@click.option(
    "--batch_size",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Samples answered together, per device; lower it when memory runs out.",
)
@click.option("--limit", type=click.IntRange(1), help="Only the first LIMIT samples.")
@_nproc_option
@_device_option
@_one_line_errors
def eval_command(
    model: Path,
    data: Path,
    adapter: Path | None,
    out_dir: Path | None,
    num_crops: int | None,
    max_new_tokens: int,
    metric: Literal["accuracy", "anls"] | None,
    anls: Literal["official", "recipe"] | None,
    batch_size: int,
    limit: int | None,
    nproc: int | None,
    device: str,
) -> None:
    """Answer the questions of a data set and score the answers.

    DATA is a shard directory, or a .jsonl file, which is validated and sharded into a cache.
    Answers are generated greedily. Accuracy compares them after outer white space and full stops
    are off, in lower case; ANLS is DocVQA's score. A split without answers is answered and not
    scored. Of a conversation every question is asked, after the turns before it as the data has
    them. With --out_dir every prediction is kept, with a confusion matrix where answers are
    classes, and a file to submit where they are DocVQA's.

    \b
      phi3v-train eval --model runs/first --data shards/val
      phi3v-train eval --model models/phi-3.5-vision --adapter runs/lora/adapter \\
          --data shards/val --out_dir runs/lora/eval
      phi3v-train eval --model runs/docvqa/model --data shards/docvqa/val --anls official \\
          --nproc 8 --out_dir runs/docvqa/eval
    """
    if anls is not None and metric == "accuracy":
        raise click.UsageError("--anls is the variant of another score than --metric accuracy")
    if data.suffix == ".jsonl":
        from phi3v_train.answering_model import NUM_CROPS, find_answering_model
        from phi3v_train.sharded_jsonl import sharded

        crops = num_crops or find_answering_model(model, adapter).num_crops or NUM_CROPS
        data = sharded(data, num_crops=crops, allow_missing_answer=True, say=_say)
    if nproc is not None and nproc > 1:
        from phi3v_train.eval_processes import run_eval_processes

        given = {**click.get_current_context().params, "data": data, "nproc": None}
        sys.exit(run_eval_processes(nproc, given))

    from rich.console import Console
    from rich.progress import Progress

    from phi3v_train.evaluate import evaluate_model
    from phi3v_train.rank_place import rank_place

    is_main = rank_place(os.environ).rank == 0
    # Shown on a terminal only, and apart from the result, so that stdout can be read by a script.
    is_silent = not (is_main and sys.stderr.isatty())
    with Progress(console=Console(stderr=True), disable=is_silent) as progress:
        task = progress.add_task("answering", total=None)
        result = evaluate_model(
            model,
            data,
            adapter=adapter,
            out_dir=out_dir,
            num_crops=num_crops,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            metric=metric or ("accuracy" if anls is None else "anls"),
            anls=anls or "official",
            limit=limit,
            device=device,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if is_main:
        click.echo(result)


@main.command("generate")
@_model_option
@click.option(
    "--image", "images", multiple=True, metavar="PATH", help="A picture; may be given many times."
)
@click.option("--prompt", required=True, help="The question.")
@_adapter_option
@click.option(
    "--num_crops",
    type=click.IntRange(1),
    help="Crops an image is cut into.  [default: what the model folder says]",
)
@_max_new_tokens_option(512)
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="0: the likeliest answer; above: sampled.",
)
@click.option(
    "--top_p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Sample among the likeliest tokens of this total probability.",
)
@click.option("--seed", default=0, show_default=True, help="Of the sampling.")
@_device_option
@_one_line_errors
def generate_command(
    model: Path,
    images: tuple[str, ...],
    prompt: str,
    adapter: Path | None,
    num_crops: int | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    device: str,
) -> None:
    """Ask one question about some pictures.

    The pictures come before the question, in the order given; or put them yourself with
    <|image_1|>, <|image_2|> ... in the prompt. The answer goes to stdout as it comes, the rest
    to stderr. Exit status: 0 answered, 1 it can't be, 130 Ctrl-C.

    \b
      phi3v-train generate --model models/phi-3.5-vision --image a.jpg --image b.jpg \\
          --prompt "What is the difference?"
      phi3v-train generate --model runs/full/model --image page.png --num_crops 16 \\
          --prompt "What is the date of the letter?"
    """
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    with console.status("loading torch and transformers") as status:
        from phi3v_train.generate import generate, load

        status.update(f"loading {model}")
        loaded, processor = load(model, adapter=adapter, num_crops=num_crops, device=device)
        status.update("reading the question" + " and its images" * bool(images))

        def show(text: str) -> None:
            status.stop()
            click.echo(text, nl=False)

        try:
            answer = generate(
                loaded,
                processor,
                prompt,
                images,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                on_text=show,
            )
        except KeyboardInterrupt:
            click.echo()
            sys.exit(130)
    click.echo()
    console.print(answer.speed, style="dim", soft_wrap=True)


_new_folder_option = click.option(
    "--out_dir", required=True, type=click.Path(path_type=Path), help="The folder to make."
)
_check_option = click.option(
    "--check",
    is_flag=True,
    help="Read what was written again: names, weights, side files and answers must be equal.",
)
_base_option = click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="The model folder that training started from, if it is no longer where it was.",
)


@main.command("report")
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), help="The HTML file.  [default: RUN/report.html]"
)
@_one_line_errors
def report_command(run: Path, out: Path | None) -> None:
    """Write the report of RUN, the output_dir of a training run.

    One page with curves, speed, answers with their pictures, the confusion matrix and all
    settings; it needs no other file and no network. A run writes it when it ends or is stopped;
    while it is going on, or after it was killed, this command does.

    \b
      phi3v-train report runs/first
    """
    from phi3v_train.report import write_report

    written = write_report(run, out)
    for note in written.notes:
        click.echo(note, err=True)
    click.echo(f"{written.path}: {written.num_bytes / 1e6:.1f} MB")


@main.command("merge")
@click.argument("adapter", metavar="ADAPTER", type=click.Path(path_type=Path))
@_new_folder_option
@_base_option
@_check_option
@_one_line_errors
def merge_command(adapter: Path, out_dir: Path, model: Path | None, check: bool) -> None:
    """Add the adapters of the folder (or run) ADAPTER into their base model.

    The sums are made in float32 and saved in the dtype of the base, under the official names, with
    the base's tokenizer and processor files. Nothing is written unless the merged model answers a
    random row as the base with its adapters does.

    \b
      phi3v-train merge runs/lora --out_dir merged
      phi3v-train merge runs/lora/adapter --out_dir merged --model models/phi-3.5-vision --check
    """
    from phi3v_train.merge import merge

    click.echo(merge(adapter, out_dir, model=model, check=check))


@main.command("export")
@click.argument("source", metavar="RUN_OR_CHECKPOINT", type=click.Path(path_type=Path))
@_new_folder_option
@click.option("--best", is_flag=True, help="Of a run: its best checkpoint, not the newest.")
@click.option("--adapter_only", is_flag=True, help="Adapters as a PEFT folder, not merged.")
@_base_option
@_check_option
@_one_line_errors
def export_command(
    source: Path,
    out_dir: Path,
    best: bool,
    adapter_only: bool,
    model: Path | None,
    check: bool,
) -> None:
    """Write a checkpoint as a Hugging Face folder, also of a run that is not finished.

    RUN_OR_CHECKPOINT is a run's output_dir or one of its checkpoints/step-*. Weights are saved in
    the dtype of the model that training started from, under the official names; adapters are
    merged, as `phi3v-train merge` does.

    \b
      phi3v-train export runs/first --out_dir newest
      phi3v-train export runs/first --best --out_dir best --check
      phi3v-train export runs/lora/checkpoints/step-00000200 --adapter_only --out_dir adapter
    """
    from phi3v_train.export_checkpoint import export_checkpoint

    exported = export_checkpoint(
        source, out_dir, model=model, best=best, adapter_only=adapter_only, check=check
    )
    click.echo(exported)


def _console() -> "Console":
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


@main.command("estimate")
@click.argument("arguments", metavar="[CONFIG] [KEY=VALUE]...", nargs=-1)
@click.option("--gpu", metavar="KEY", help="Kind of GPU: a100-80g, h100-80g, rtx-4090 ...")
@click.option("--sku", metavar="NAME", help="Azure size instead: Standard_ND96asr_v4 ...")
@click.option(
    "--num_gpus", type=click.IntRange(1), help="In a machine.  [default: 1, or all of the size's]"
)
@click.option(
    "--num_machines", type=click.IntRange(1), default=1, show_default=True, help="Of that kind."
)
@click.option(
    "--efficiency",
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of the GPU's peak while it computes.  [default: an assumption, by kind]",
)
@click.option(
    "--as_is",
    is_flag=True,
    help="Rows and recomputing as CONFIG has them, not the fastest setting that fits.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with every number.")
@_one_line_errors
def estimate_command(
    arguments: tuple[str, ...],
    gpu: str | None,
    sku: str | None,
    num_gpus: int | None,
    num_machines: int,
    efficiency: float | None,
    as_is: bool,
    as_json: bool,
) -> None:
    """Predict memory and speed of every method on named GPUs, and say what to run.

    Arithmetic only: neither GPU nor weights are needed. Where CONFIG (or KEY=VALUE) names a model
    folder and shards that exist, sizes and lengths are theirs; else they are those of
    Phi-3.5-vision and of pages of documents.

    \b
      phi3v-train estimate --sku Standard_ND96asr_v4 train.global_batch_size=64
      phi3v-train estimate docvqa.yaml --gpu a100-80g --num_gpus 8
      phi3v-train estimate ucf101.yaml --gpu rtx-4090 --as_is --json

    Exit status: 0 something fits, 1 nothing does.
    """
    import json

    from phi3v_train.estimate_report import make_report, print_report

    config_path, overrides = _split_arguments(arguments)
    report = make_report(
        config_path,
        overrides,
        gpu=gpu,
        sku=sku,
        num_gpus=num_gpus,
        num_machines=num_machines,
        efficiency=efficiency,
        as_is=as_is,
    )
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=2))
    else:
        print_report(report, _console())
    sys.exit(0 if report.advice.option is not None else 1)


@main.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_one_line_errors
def doctor_command(as_json: bool) -> None:
    """Show what a bug report needs, and what is wrong with this machine.

    Versions, driver, GPUs and whether this torch has kernels for them, memory, disks, limits; then
    findings, each with the way out.

    \b
      phi3v-train doctor
      phi3v-train doctor --json > machine.json

    Exit status: 0 nothing stops training, 1 something does.
    """
    import json
    from dataclasses import asdict

    from phi3v_train.doctor import collect, examine, print_diagnosis

    facts = collect()
    findings = examine(facts)
    if as_json:
        record = {"facts": asdict(facts), "findings": [asdict(finding) for finding in findings]}
        click.echo(json.dumps(record, indent=2))
    else:
        print_diagnosis(facts, findings, _console())
    sys.exit(1 if any(finding.severity == "error" for finding in findings) else 0)


@main.command("bench")
@click.argument("arguments", metavar="[CONFIG] [KEY=VALUE]...", nargs=-1)
@click.option(
    "--steps", "num_steps", type=click.IntRange(1), default=10, show_default=True, help="Measured."
)
@click.option(
    "--warmup",
    "num_warmup",
    type=click.IntRange(0),
    default=3,
    show_default=True,
    help="Steps before them.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_one_line_errors
def bench_command(
    arguments: tuple[str, ...], num_steps: int, num_warmup: int, as_json: bool
) -> None:
    """Measure step time, memory and MFU of a configuration, on random weights and made-up rows.

    `model` is a folder with a config.json, or `phi-3.5-vision`, or `tiny`; without CONFIG,
    `output_dir` and `data.train` need not be set. Reading and decoding are not part of it.

    \b
      phi3v-train bench model=tiny data.num_crops=1 data.max_tokens_per_row=1024
      phi3v-train bench model=phi-3.5-vision method.name=lora data.max_tokens_per_row=4096
      torchrun --nproc_per_node 8 -m phi3v_train.cli bench docvqa.yaml --json
    """
    import json

    from phi3v_train.bench import print_bench, run_bench
    from phi3v_train.estimate_report import load_without_places

    config_path, overrides = _split_arguments(arguments)
    result = run_bench(
        load_without_places(config_path, overrides), num_steps=num_steps, num_warmup=num_warmup
    )
    if int(os.environ.get("RANK", "0")) != 0:
        return
    if as_json:
        click.echo(json.dumps(result.as_json(), indent=2))
    else:
        print_bench(result, _console())


if __name__ == "__main__":
    main()
