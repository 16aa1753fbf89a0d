"""The training loop, read top to bottom.

    train(load_config("ucf101.yaml"))

    runs/ucf101/
        config.yaml         resolved, defaults included
        env.json            where it ran
        log.jsonl           a line per interval     logs/rank-N.jsonl, of several processes
        tensorboard/        the same for TensorBoard
        report.html         all of it to look at
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
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from phi3v_data.atomic import write_atomic
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from phi3v_train.checkpoint import (
    CheckpointError,
    RunState,
    check_same_run,
    latest_checkpoint,
    load_checkpoint,
    model_hash,
    read_state,
    save_checkpoint,
    settle,
)
from phi3v_train.collator import Batch
from phi3v_train.config import TrainConfig, dump_config, training_maths
from phi3v_train.engine import Engine, World, join_world
from phi3v_train.engine_choice import choose_engine, describe_engine, make_engine
from phi3v_train.env_report import add_attempt, environment
from phi3v_train.evaluate import EvalResult
from phi3v_train.export import export_adapter, export_model
from phi3v_train.flops import NO_WORK, Work, training_flops
from phi3v_train.guards import explain_non_finite, guard_gradients
from phi3v_train.interrupts import Interrupts
from phi3v_train.methods import (
    TrainingModel,
    choose_precision,
    load_to_train,
    move,
    prepare,
    read_model_config,
)
from phi3v_train.modeling_phi3_v import Phi3VForCausalLM
from phi3v_train.optimizer import make_optimizer, set_learning_rate
from phi3v_train.peaks import peak_flops
from phi3v_train.restarts import has_started, note_start
from phi3v_train.retention import Keep, Score
from phi3v_train.run_evaluation import RunEvaluation, open_run_evaluation
from phi3v_train.runlog import Line, RankLine, RunLog, Sink, check_log, open_sinks
from phi3v_train.sources import Source
from phi3v_train.startup_box import count_parameters, describe_run, print_box
from phi3v_train.stream import StreamSettings, TrainStream, open_stream
from phi3v_train.throughput import Meter

OUTPUTS = (
    *("checkpoints", "eval", "model", "adapter", "log.jsonl", "config.yaml"),
    *("env.json", "logs", "report.html", "tensorboard"),
)
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
        with ExitStack() as at_end:
            return _train(config, world, at_end, resume=resume, overwrite=overwrite)
    finally:
        world.leave()


def _train(
    config: TrainConfig, world: World, at_end: ExitStack, *, resume: bool, overwrite: bool
) -> TrainResult:
    if config.model.resolve() == (config.output_dir / "model").resolve():
        raise ValueError(
            f"model and output_dir: the result would be written over the model it starts from, "
            f"{config.model}; use another output_dir"
        )
    # All ranks look before one of them may remove the note.
    overwrite = overwrite and not any(world.gather(has_started(config.output_dir)))
    checkpoint = None if overwrite else latest_checkpoint(config.output_dir)
    if resume and checkpoint is None:
        raise CheckpointError(
            f"{config.output_dir} has no checkpoint to resume from; leave --resume out to start"
        )

    check_log(config)

    # --- data: the whole order, before any image is read
    stream = _open_stream(config, world)
    num_steps = _num_steps(config, stream)
    evaluation = _open_evaluation(config, world, stream)

    # --- position: a checkpoint of another run is refused before the weights are loaded
    precision = choose_precision(config.precision, world.device)
    model_config = read_model_config(config.model)
    parallel = choose_engine(config, model_config, precision, world)
    saved_dtype = model_config.dtype
    assert saved_dtype is None or isinstance(saved_dtype, torch.dtype)
    weights_hash = world.from_main(model_hash(config.model) if world.is_main else None)

    def state_at(step: int, state_format: str = "dcp", score: Score | None = None) -> RunState:
        maths = training_maths(config)
        return RunState(step, stream.identity, maths, weights_hash, state_format, score)

    start = 0
    if checkpoint is not None:
        saved = read_state(checkpoint)
        check_same_run(checkpoint, saved, state_at(saved.step))
        start = saved.step
        if evaluation is not None:
            evaluation.recall(start)

    # --- model
    training = load_to_train(
        config.model, config.method, precision, seed=config.seed, device=world.device
    )
    model = training.model
    counts = count_parameters(model.named_parameters())
    engine = make_engine(
        parallel,
        training,
        world,
        lambda trainable: make_optimizer(trainable, config.optim),
        max_grad_norm=config.optim.max_grad_norm,
    )
    if checkpoint is not None:
        load_checkpoint(checkpoint, engine)
    sinks: list[Sink] = []
    if world.is_main:
        if overwrite:  # only now: what an earlier run left is not lost to one that cannot start
            _remove_outputs(config.output_dir)
        if start == 0:
            note_start(config.output_dir)
        write_atomic(config.output_dir / "config.yaml", dump_config(config))
        add_attempt(config.output_dir / "env.json", environment(), start_step=start)
        sinks = open_sinks(config, start=start)
        for sink in sinks:
            at_end.callback(sink.close)
        print_box(
            describe_run(
                config,
                world,
                stream,
                counts,
                precision=precision,
                num_steps=num_steps,
                engine=describe_engine(parallel) if parallel.engine != "single" else None,
            )
        )
    log = RunLog(
        config.output_dir,
        is_main=world.is_main,
        num_steps=num_steps,
        start=start,
        rank=world.rank if world.world_size > 1 else None,
        sinks=sinks,
    )
    if checkpoint is not None:
        log.say(f"going on from {checkpoint.name}: {start} of {num_steps} steps are done")

    before: EvalResult | None = None
    if evaluation is not None and config.eval.before and start == 0:
        with _progress("evaluating", is_shown=world.is_main) as on_progress:
            before = evaluation.answer(
                engine.whole(training.autocast_dtype).model,
                "before",
                training.autocast_dtype,
                on_progress,
            )
        log.say(f"before training: {before}")
        if before.score is not None:
            log.scores(start, {before.metric: before.score})

    def evaluate_after(step: int) -> None:
        if evaluation is not None and evaluation.is_due(step, num_steps):
            model.eval()
            with _progress("evaluating", is_shown=world.is_main) as on_progress:
                point = evaluation.after_step(
                    step,
                    num_steps,
                    engine.loss_sum,
                    partial(engine.whole, training.autocast_dtype),
                    on_progress,
                )
            model.train()
            log.say(evaluation.describe(point))
            log.scores(step, point.values)

    keep = Keep(
        config.checkpoint.keep, config.checkpoint.keep_best, config.checkpoint.keep_every_steps
    )
    if world.is_main:  # what a kill left half done
        settle(config.output_dir, keep)

    def save(step: int, score: Score | None = None) -> None:
        state = state_at(step, engine.state_format, score)
        path = save_checkpoint(config.output_dir, state, engine, world, keep)
        log.say(f"saved {path}")

    # --- the loop
    def heard(number: signal.Signals) -> None:
        log.say(f"{number.name}: finishing the step, then saving (again to stop at once)")

    model.train()
    done, saved_at, stopped_by = start, start, None
    last_save = time.monotonic()
    if start and evaluation is not None and not evaluation.is_known(start):
        evaluate_after(start)  # a signal came first
    is_over = evaluation is not None and evaluation.is_out_of_patience
    steps = stream.steps(start, start if is_over else num_steps)
    with Interrupts(heard) as interrupts, log, closing(steps):
        meter = Meter(peak_flops=_peak(world, precision), num_devices=world.world_size)
        losses: list[float] = []  # since the last line
        num_labels = 0
        waited_from = time.perf_counter()
        for step, rows in steps:
            waited = time.perf_counter() - waited_from
            for name in stream.take_skipped():
                log.say(f"left out, its bytes are damaged: {name} ({stream.num_skipped} so far)")
            rate = set_learning_rate(engine.optimizer, config.optim, step, num_steps)
            row_losses, label_tokens = _forward_backward(config, engine, rows, step)
            if step == start:
                guard_gradients(engine)
            done = step + 1

            work = sum(map(Work.of_row, rows), NO_WORK)
            # The main process's clock says when so many minutes are over.
            is_due = world.is_main and config.checkpoint.is_due(done, time.monotonic() - last_save)
            loss, waits, tokens, images, flops, stop, due = world.sum(
                float(torch.stack(row_losses).sum()),
                waited,
                work.num_tokens,
                sum(len(row.crop_grid) for row in rows),
                training_flops(model_config, config.method, work),
                int(interrupts.signal or 0),
                is_due,
            )
            if not math.isfinite(loss):
                seed = partial(_seed_row, config, world, step)
                raise ValueError(
                    explain_non_finite(engine, rows, row_losses, step=step, reseed=seed)
                )
            norm = engine.step()
            loss /= max(label_tokens, 1)
            losses.append(loss)
            num_labels += int(label_tokens)
            wait = waits / world.world_size
            meter.add(tokens=tokens, images=images, flops=flops, wait_seconds=wait)
            log.advance(done, loss)
            if done % config.train.log_every == 0 or stop or done == num_steps:
                reading = meter.read()
                memory, seconds = _memory_gib(world.device), time.perf_counter() - log.started
                log.line(
                    Line(
                        step=done,
                        num_steps=num_steps,
                        epoch=stream.epochs_at(done),
                        loss=sum(losses) / len(losses),
                        learning_rate=rate,
                        grad_norm=norm,
                        label_tokens=num_labels,
                        tokens_per_second=reading.tokens_per_second,
                        images_per_second=reading.images_per_second,
                        data_wait=reading.data_wait,
                        memory_gib=memory,
                        mfu=reading.mfu,
                        eta_seconds=meter.seconds_left(done - start, num_steps - done),
                        seconds=seconds,
                    )
                )
                log.rank_line(
                    RankLine(
                        step=done,
                        num_rows=len(rows),
                        num_samples=sum(len(row.sample_ids) for row in rows),
                        num_tokens=work.num_tokens,
                        num_crops=work.num_crops,
                        wait_seconds=waited,
                        memory_gib=memory,
                        seconds=seconds,
                    )
                )
                losses, num_labels = [], 0
            if evaluation is not None and not stop:
                with meter.outside():
                    evaluate_after(done)
                is_over = evaluation.is_out_of_patience
            score = evaluation.score_at(done) if evaluation is not None else None
            is_best = keep.best > 0 and evaluation is not None and evaluation.is_best(done)
            if stop or due or is_best or is_over or done == num_steps:
                with meter.outside():
                    save(done, score)
                saved_at, last_save = done, time.monotonic()
            if stop and done < num_steps:
                stopped_by = interrupts.signal or signal.SIGTERM  # another rank heard it
                break
            if is_over:
                break
            waited_from = time.perf_counter()
    assert saved_at == done

    if stopped_by is not None:
        _report(config, world, log)
        log.say(f"stopped after {done} of {num_steps} steps; run the same command again to go on")
        return TrainResult(done, num_steps, None, stopped_by=stopped_by)

    if evaluation is not None and is_over and done < num_steps:
        log.say(f"ended after {done} of {num_steps} steps: {evaluation.why_it_is_over}")

    # --- the result
    is_lora = training.adapters is not None
    trained = engine.whole(None if is_lora else saved_dtype)
    output = _export(config, world, trained, saved_dtype)
    log.say(f"wrote {output}")
    best = evaluation.best if evaluation is not None else None
    if best is not None and best.step != done and keep.best and engine.state_format == "dcp":
        log.say(
            f"these are the weights of step {done}; the best were those of step {best.step}: "
            f"phi3v-train export {config.output_dir} --best --out_dir FOLDER"
        )
    after: EvalResult | None = None
    if config.eval.after and evaluation is not None:
        with _progress("evaluating", is_shown=world.is_main) as on_progress:
            after = evaluation.answer(trained.model, "after", on_progress=on_progress)
        log.say(f"after training: {after}")
        if after.score is not None:
            log.scores(done, {after.metric: after.score})
    _report(config, world, log)
    return TrainResult(
        done,
        num_steps,
        output,
        accuracy_before=before.accuracy if before else None,
        accuracy_after=after.accuracy if after else None,
    )


def _forward_backward(
    config: TrainConfig, engine: Engine, rows: list[Batch], step: int
) -> tuple[list[Tensor], float]:
    """All rows of this rank: (a sum of losses each, label tokens of the step over all ranks)."""
    world = engine.world
    (label_tokens,) = world.sum(sum(row.num_label_tokens for row in rows))
    losses: list[Tensor] = []
    for number, row in enumerate(rows):
        _seed_row(config, world, step, number)
        is_last = number == len(rows) - 1
        try:
            loss = engine.loss_sum(row, is_last=is_last)
            # Ranks average their gradients; the loss is a sum over ranks.
            engine.backward(loss * (world.world_size / max(label_tokens, 1)), is_last=is_last)
        except torch.OutOfMemoryError as error:
            raise ValueError(_out_of_memory(config, row)) from error
        losses.append(loss.detach())
    return losses, label_tokens


def _seed_row(config: TrainConfig, world: World, step: int, number: int) -> None:
    """Dropout is a function of the position, not of what ran before it."""
    position = np.random.SeedSequence((config.seed, step, world.rank, number))
    torch.manual_seed(int(position.generate_state(1, np.uint64)[0] >> np.uint64(1)))


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
        window_bytes=(
            config.data.shuffle_window_mib << 20 if config.data.shuffle_window_mib else None
        ),
        damaged=config.data.damaged,
        rank=world.rank,
        world_size=world.world_size,
        num_workers=config.data.num_workers,
        prefetch_bytes=config.data.prefetch_mib << 20,
    )
    sources = [Source(source.path, source.weight) for source in config.data.train]
    with _progress("measuring samples", is_shown=world.is_main) as on_progress:
        return open_stream(sources, config.model, settings, on_progress)


def _open_evaluation(
    config: TrainConfig, world: World, stream: TrainStream
) -> RunEvaluation | None:
    if config.data.eval is None or not config.eval.is_wanted:
        return None
    with _progress("measuring data.eval", is_shown=world.is_main) as on_progress:
        return open_run_evaluation(config, world, stream.encoder, stream.settings, on_progress)


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


def _report(config: TrainConfig, world: World, log: RunLog) -> None:
    if world.is_main and config.log.report:
        from phi3v_train.report import write_report  # with matplotlib, which nothing else needs

        log.say(f"wrote {write_report(config.output_dir).path}")


def _peak(world: World, precision: str) -> float | None:
    """Operations a second of one device at most; None where that is not known."""
    if world.device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(world.device), precision)


def _memory_gib(device: torch.device) -> float:
    """Peak so far: of a GPU what torch allocated, of a CPU what this process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# --- what is about to run -------------------------------------------------------------------------


def describe(config: TrainConfig, *, world_size: int = 1) -> None:
    """Print what `train` would run, without weights and without a step.

    Raises:
        ValueError: what `train` would find before its first step.
    """
    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    world = World(rank=0, world_size=world_size, device=device)
    stream = _open_stream(config, world)
    model_config = read_model_config(config.model)
    with torch.device("meta"):
        model = Phi3VForCausalLM(model_config)
    precision = choose_precision(config.precision, device)
    parallel = choose_engine(config, model_config, precision, world)
    prepare(model, config.method, precision, seed=config.seed)
    print_box(
        describe_run(
            config,
            world,
            stream,
            count_parameters(model.named_parameters()),
            precision=precision,
            num_steps=_num_steps(config, stream),
            engine=describe_engine(parallel) if parallel.engine != "single" else None,
        )
    )
    checkpoint = latest_checkpoint(config.output_dir)
    if checkpoint is not None:
        print_box({"would go on from": str(checkpoint)})
