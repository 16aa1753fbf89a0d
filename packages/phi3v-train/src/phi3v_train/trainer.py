"""The training loop, read top to bottom.

    train(load_config("ucf101.yaml"))

    runs/ucf101/
        config.yaml         resolved, defaults included
        log.jsonl           a line per interval
        checkpoints/        to go on from
        eval_before.json    if asked for     eval/before/predictions.jsonl
        eval_after.json     where data.eval is set
        model/ or adapter/  the result, as a Hugging Face or PEFT folder

A step: all rows of the global batch, forward and backward, gradients joined over ranks in the last
row; clip; update. The loss is the sum over the label tokens of the step, over all ranks, divided
by their number: packing, accumulation and world size don't change it.

Where it stops, it goes on: the same command continues from the newest checkpoint, or says what
changed. A signal (Ctrl-C, SIGTERM, SIGUSR1) finishes the step and saves.
"""

import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from phi3v_data.atomic import write_atomic
from phi3v_data.shards import open_shards
from rich.console import Console
from rich.progress import Progress
from torch import nn

from phi3v_train.checkpoint import (
    CheckpointError,
    RunState,
    check_same_run,
    latest_checkpoint,
    load_checkpoint,
    model_hash,
    read_state,
    save_checkpoint,
)
from phi3v_train.collator import Batch
from phi3v_train.config import TrainConfig, dump_config, training_maths
from phi3v_train.engine import Engine, World, join_world
from phi3v_train.evaluate import EvalResult, evaluate, summarize, write_result
from phi3v_train.export import export_adapter, export_model
from phi3v_train.interrupts import Interrupts
from phi3v_train.methods import (
    TrainingModel,
    choose_precision,
    load_model,
    move,
    part_of,
    prepare,
    read_model_config,
)
from phi3v_train.modeling_phi3_v import Phi3VForCausalLM
from phi3v_train.runlog import Interval, Line, RunLog, print_box
from phi3v_train.schedule import learning_rate
from phi3v_train.sources import Source
from phi3v_train.stream import StreamSettings, TrainStream, open_stream

OUTPUTS = ("checkpoints", "eval", "model", "adapter", "log.jsonl", "config.yaml")
"""What a run writes, beside eval_*.json; `--overwrite` removes these and nothing else."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a run ended."""

    step: int
    """Steps done."""
    num_steps: int
    """Steps of the whole run."""
    output: Path | None
    """The trained model or adapter; None where the run is not finished."""
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    stopped_by: signal.Signals | None = None
    """The signal that ended this attempt early."""

    @property
    def exit_status(self) -> int:
        """0, or 128 + the number of the signal that stopped the run."""
        return 0 if self.stopped_by is None else 128 + int(self.stopped_by)


def train(config: TrainConfig, *, resume: bool = False, overwrite: bool = False) -> TrainResult:
    """Train, or go on training.

    Args:
        config: the whole run.
        resume: there must be a checkpoint to go on from.
        overwrite: start anew, over what an earlier run left in `output_dir`.

    Raises:
        ValueError: the run can't start or go on; one line says why.
    """
    if resume and overwrite:
        raise ValueError("resume goes on with a run and overwrite starts anew: choose one")
    world = join_world(config.device)
    try:
        return _train(config, world, resume=resume, overwrite=overwrite)
    finally:
        world.leave()


def _train(config: TrainConfig, world: World, *, resume: bool, overwrite: bool) -> TrainResult:
    if config.model.resolve() == (config.output_dir / "model").resolve():
        raise ValueError(
            f"model and output_dir: the result would be written over the model it starts from, "
            f"{config.model}; use another output_dir"
        )
    checkpoint = None if overwrite else latest_checkpoint(config.output_dir)
    if resume and checkpoint is None:
        raise CheckpointError(
            f"{config.output_dir} has no checkpoint to resume from; leave --resume out to start"
        )

    # --- data: the whole order, before any image is read
    stream = _open_stream(config, world)
    num_steps = _num_steps(config, stream)

    # --- position: a checkpoint of another run is refused before the weights are loaded
    precision = choose_precision(config.precision, world.device)
    saved_dtype = read_model_config(config.model).dtype
    assert saved_dtype is None or isinstance(saved_dtype, torch.dtype)
    weights_hash = world.from_main(model_hash(config.model) if world.is_main else None)

    def state_at(step: int) -> RunState:
        return RunState(step, stream.identity, training_maths(config), weights_hash)

    start = 0
    if checkpoint is not None:
        saved = read_state(checkpoint)
        check_same_run(checkpoint, saved, state_at(saved.step))
        start = saved.step

    # --- model
    model = load_model(config.model)
    move(model, world.device)
    training = prepare(model, config.method, precision, seed=config.seed)
    engine = Engine(model, world, training.autocast_dtype)
    parameters = list(training.trainable.values())
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.optim.learning_rate,
        betas=config.optim.betas,
        eps=config.optim.eps,
        weight_decay=config.optim.weight_decay,
    )
    if checkpoint is not None:
        load_checkpoint(checkpoint, training.trainable, model, optimizer, engine.scaler, world)
    if world.is_main:
        if overwrite:  # only now: what an earlier run left is not lost to one that cannot start
            _remove_outputs(config.output_dir)
        write_atomic(config.output_dir / "config.yaml", dump_config(config))

    log = RunLog(config.output_dir, is_main=world.is_main, num_steps=num_steps, start=start)
    log.box(_box(config, world, stream, training, precision, num_steps))
    if checkpoint is not None:
        log.say(f"going on from {checkpoint.name}: {start} of {num_steps} steps are done")

    before: EvalResult | None = None
    if config.eval.before and start == 0:
        before = _evaluate(config, world, model, stream, log, "before")

    def save(step: int) -> None:
        path = save_checkpoint(
            config.output_dir,
            state_at(step),
            training.trainable,
            model,
            optimizer,
            engine.scaler.state_dict(),
            world,
            keep=config.checkpoint.keep,
        )
        log.say(f"saved {path}")

    # --- the loop
    def heard(number: signal.Signals) -> None:
        log.say(f"{number.name}: finishing the step, then saving (again to stop at once)")

    model.train()
    done, saved_at, stopped_by = start, start, None
    steps = stream.steps(start, num_steps)
    with Interrupts(heard) as interrupts, log, closing(steps):
        interval = Interval(started=time.perf_counter())
        waited_from = time.perf_counter()
        for step, rows in steps:
            waited = time.perf_counter() - waited_from
            rate = learning_rate(config.optim, step, num_steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, label_tokens = _forward_backward(config, engine, rows, step)
            if step == start:
                _guard_gradients(training)
            norm = engine.step(optimizer, parameters, config.optim.max_grad_norm)
            done = step + 1

            loss, waits, tokens, images, stop = world.sum(
                loss,
                waited,
                sum(len(row.input_ids) for row in rows),
                sum(len(row.crop_grid) for row in rows),
                int(interrupts.signal or 0),
            )
            loss /= label_tokens
            interval.add(
                loss=loss,
                label_tokens=int(label_tokens),
                tokens=int(tokens),
                images=int(images),
                wait=waits / world.world_size,
            )
            log.advance(done, loss)
            if done % config.train.log_every == 0 or done == num_steps:
                log.line(_line(log, interval, done, num_steps, stream, rate, norm, world))
                interval = Interval(started=time.perf_counter())
            every = config.checkpoint.every_steps
            if stop or done == num_steps or (every is not None and done % every == 0):
                save(done)
                saved_at = done
            if stop and done < num_steps:
                stopped_by = interrupts.signal or signal.SIGTERM  # another rank heard it
                break
            waited_from = time.perf_counter()
    assert saved_at == done

    if stopped_by is not None:
        log.say(f"stopped after {done} of {num_steps} steps; run the same command again to go on")
        return TrainResult(done, num_steps, None, stopped_by=stopped_by)

    # --- the result
    output = _export(config, world, training, saved_dtype)
    log.say(f"wrote {output}")
    after: EvalResult | None = None
    if config.eval.after and config.data.eval is not None:
        after = _evaluate(config, world, model, stream, log, "after")
    return TrainResult(
        done,
        num_steps,
        output,
        accuracy_before=before.accuracy if before else None,
        accuracy_after=after.accuracy if after else None,
    )


def _forward_backward(
    config: TrainConfig, engine: Engine, rows: list[Batch], step: int
) -> tuple[float, float]:
    """All rows of this rank: (its sum of losses, label tokens of the step over all ranks)."""
    world = engine.world
    (label_tokens,) = world.sum(sum(row.num_label_tokens for row in rows))
    losses: list[torch.Tensor] = []
    for number, row in enumerate(rows):
        # Dropout is a function of the position, not of what ran before it.
        torch.manual_seed(_row_seed(config.seed, step, world.rank, number))
        is_last = number == len(rows) - 1
        try:
            loss = engine.loss_sum(row, is_last=is_last)
            # Ranks average their gradients; the loss is a sum over ranks.
            engine.backward(loss * (world.world_size / label_tokens), is_last=is_last)
        except torch.OutOfMemoryError as error:
            raise ValueError(_out_of_memory(config, row)) from error
        losses.append(loss.detach())
    total = float(torch.stack(losses).sum())
    if not math.isfinite(total):
        for row, loss in zip(rows, losses, strict=True):
            if not torch.isfinite(loss):
                raise ValueError(
                    f"step {step + 1}, rank {world.rank}: the loss is {float(loss)} on samples "
                    f"{', '.join(row.sample_ids)}; a lower optim.learning_rate or precision=fp32 "
                    "may help"
                )
    return total, label_tokens


def _row_seed(*position: int) -> int:
    return int(np.random.SeedSequence(position).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _guard_gradients(training: TrainingModel) -> None:
    """After the first backward pass every trainable tensor has a gradient; zero is one."""
    missing = [name for name, p in training.trainable.items() if p.grad is None]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if missing[5:] else "")
        raise ValueError(
            f"{len(missing)} of {len(training.trainable)} trainable tensors got no gradient in the "
            f"first step and would never train: {shown}; freeze them, or report this"
        )


def _out_of_memory(config: TrainConfig, row: Batch) -> str:
    return (
        f"out of memory on a row of {len(row.sample_ids)} samples, {len(row.input_ids)} tokens and "
        f"{len(row.pixel_values)} crops; lower data.max_tokens_per_row "
        f"({config.data.max_tokens_per_row}) or data.num_crops ({config.data.num_crops}), or set "
        "method.gradient_checkpointing=true"
    )


# --- around the loop ------------------------------------------------------------------------------


def _open_stream(config: TrainConfig, world: World) -> TrainStream:
    settings = StreamSettings(
        num_crops=config.data.num_crops,
        max_tokens_per_row=config.data.max_tokens_per_row,
        global_batch_size=config.train.global_batch_size,
        num_epochs=_num_epochs(config),
        seed=config.seed,
        overlong=config.data.overlong,
        resize=config.data.resize,
        global_batch_unit=config.train.global_batch_unit,
        temperature=config.data.temperature,
        epoch_size=config.data.epoch_size,
        window_bytes=(config.data.shuffle_window_mib or 0) << 20,
        rank=world.rank,
        world_size=world.world_size,
        num_workers=config.data.num_workers,
        prefetch_bytes=config.data.prefetch_mib << 20,
    )
    sources = [Source(source.path, source.weight) for source in config.data.train]
    with _progress("measuring samples", is_shown=world.is_main) as on_progress:
        return open_stream(sources, config.model, settings, on_progress)


@contextmanager
def _progress(title: str, *, is_shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, gone when done; yields what to call with (done, of all)."""
    console = Console(stderr=True)
    with Progress(
        console=console, transient=True, disable=not (is_shown and console.is_terminal)
    ) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _num_epochs(config: TrainConfig) -> int:
    """Epochs in the stream: enough for `max_steps`, however many that takes."""
    return config.train.num_epochs if config.train.max_steps is None else 2**31


def _num_steps(config: TrainConfig, stream: TrainStream) -> int:
    return config.train.max_steps or stream.num_steps


def _remove_outputs(output_dir: Path) -> None:
    for name in OUTPUTS:
        path = output_dir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for path in output_dir.glob("eval_*.json"):
        path.unlink()


def _evaluate(
    config: TrainConfig,
    world: World,
    model: Phi3VForCausalLM,
    stream: TrainStream,
    log: RunLog,
    when: str,
) -> EvalResult:
    """Evaluate on all ranks, each its share, and write the result."""
    assert config.data.eval is not None
    reader = open_shards(config.data.eval)
    count = min(len(reader), config.eval.limit or len(reader))
    own = range(world.rank, count, world.world_size)
    with _progress(f"evaluating {when}", is_shown=world.is_main) as on_progress:
        shares = world.gather(
            evaluate(
                model,
                stream.encoder,
                reader,
                numbers=own,
                max_new_tokens=config.eval.max_new_tokens,
                on_progress=lambda done: on_progress(done, len(own)),
            )
        )
    merged = [
        shares[number % world.world_size][number // world.world_size] for number in range(count)
    ]
    result = summarize(merged)
    if world.is_main:
        write_result(result, config.output_dir / "eval" / when)
        text = (config.output_dir / "eval" / when / "eval.json").read_text()
        write_atomic(config.output_dir / f"eval_{when}.json", text)
    log.say(f"{when} training: {result}")
    return result


def _export(
    config: TrainConfig, world: World, training: TrainingModel, dtype: torch.dtype | None
) -> Path:
    is_lora = training.adapters is not None
    output = config.output_dir / ("adapter" if is_lora else "model")
    if world.is_main:
        if is_lora:
            export_adapter(training.adapters, config.model, output)
        else:
            export_model(training.model, config.model, output, dtype)
    elif not is_lora and dtype is not None:
        move(training.model, dtype)  # every rank evaluates what was saved
    world.barrier()
    return output


def _line(
    log: RunLog,
    interval: Interval,
    done: int,
    num_steps: int,
    stream: TrainStream,
    rate: float,
    norm: float,
    world: World,
) -> Line:
    seconds = time.perf_counter() - interval.started
    memory = None
    if world.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(world.device) / 2**30
    return Line(
        step=done,
        num_steps=num_steps,
        epoch=stream.epochs_at(done),
        loss=interval.loss / interval.num_steps,
        learning_rate=rate,
        grad_norm=norm,
        label_tokens=interval.label_tokens,
        tokens_per_second=interval.tokens / seconds,
        images_per_second=interval.images / seconds,
        data_wait=interval.wait_seconds / seconds,
        memory_gib=memory,
        seconds=time.perf_counter() - log.started,
    )


# --- what is about to run -------------------------------------------------------------------------


def _trainable_by_part(trainable: dict[str, nn.Parameter]) -> str:
    counts: dict[str, int] = {}
    for name, parameter in trainable.items():
        part = part_of(name)
        counts[part] = counts.get(part, 0) + parameter.numel()
    return ", ".join(f"{part} {count:,}" for part, count in counts.items())


def _box(
    config: TrainConfig,
    world: World,
    stream: TrainStream,
    training: TrainingModel,
    precision: str,
    num_steps: int,
) -> dict[str, str]:
    total = sum(p.numel() for p in training.model.parameters())
    trainable = sum(p.numel() for p in training.trainable.values())
    method = config.method.name
    if method == "lora":
        method += f", rank {config.method.lora.rank}, alpha {config.method.lora.alpha}"
    return {
        "model": f"{config.model} ({total:,} parameters)",
        "method": f"{method}, {precision}",
        "trainable": f"{trainable:,} ({trainable / total:.1%}): "
        + _trainable_by_part(training.trainable),
        "devices": f"{world.world_size} x {world.device.type}",
        **_data_rows(config, stream, num_steps),
        "output": str(config.output_dir),
    }


def _data_rows(config: TrainConfig, stream: TrainStream, num_steps: int) -> dict[str, str]:
    """What the plan of the first epoch amounts to."""
    summary = stream.plan(0).summary()
    sources = stream.sources
    rows = {
        "data": f"{summary.num_samples:,} samples an epoch, {summary.num_tokens:,} tokens, "
        f"{summary.num_label_tokens:,} of them learned; num_crops {config.data.num_crops}",
    }
    if len(sources.readers) > 1:
        rows["sources"] = ", ".join(
            f"{source.path} {count:,} of {size:,}"
            for source, count, size in zip(
                sources.sources, stream.samples_by_source(0), sources.sizes, strict=True
            )
        )
    if len(stream.overlong):
        rows["dropped"] = f"{len(stream.overlong):,} too long for a row: {stream.name_overlong()}"
    rows["rows"] = (
        f"{summary.num_rows:,} an epoch, {summary.utilisation:.0%} of "
        f"{config.data.max_tokens_per_row} tokens full; {summary.num_empty_rows:,} empty ones"
    )
    rows["balance"] = (
        f"{summary.balance:.1%}; tokens by rank {_spread(summary.tokens_per_rank)}, "
        f"crops {_spread(summary.crops_per_rank)}"
    )
    unit = config.train.global_batch_unit.replace("_", " ")
    rows["steps"] = (
        f"{num_steps:,} of {config.train.global_batch_size} {unit}; "
        f"{stream.steps_per_epoch:,} an epoch"
    )
    return rows


def _spread(counts: Sequence[int]) -> str:
    """`1,200`, or `1,150 to 1,250` over the ranks."""
    least, most = min(counts), max(counts)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def describe(config: TrainConfig, *, world_size: int = 1) -> None:
    """Print what `train` would run, without weights and without a step.

    Raises:
        ValueError: what `train` would find before its first step.
    """
    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    world = World(rank=0, world_size=world_size, device=device)
    stream = _open_stream(config, world)
    with torch.device("meta"):
        model = Phi3VForCausalLM(read_model_config(config.model))
    precision = choose_precision(config.precision, device)
    training = prepare(model, config.method, precision, seed=config.seed)
    print_box(_box(config, world, stream, training, precision, _num_steps(config, stream)))
    checkpoint = latest_checkpoint(config.output_dir)
    if checkpoint is not None:
        print_box({"would go on from": str(checkpoint)})
