"""How fast a configuration trains here, and in how much memory: measured, on random weights.

    result = run_bench(load_config("docvqa.yaml"), num_steps=10)
    result.seconds, result.peak_bytes, result.mfu
    print_bench(result)

Needs no weights and no data. The model has the sizes of `model`: a folder's config.json, or one of
the words `phi-3.5-vision` and `tiny`. Rows are made up, as full as `data.max_tokens_per_row`
allows: pages of documents (1275 x 1650 pixels), or up to `num_crops` 4 eight video frames (320 x
240) a sample, with 38 tokens of text and 10 with loss. Reading and decoding are not part of it.

Under torchrun all processes share a step, as in training:

    torchrun --nproc_per_node 8 -m phi3v_train.cli bench model=phi-3.5-vision
"""

import math
import os
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from phi3v_train.collator import Batch, EncodedSample, collate
from phi3v_train.config import TrainConfig
from phi3v_train.configuration_phi3_v import Phi3VConfig
from phi3v_train.engine import Engine, World, join_world
from phi3v_train.engine_choice import choose_engine, make_engine
from phi3v_train.flops import NO_WORK, Work, training_flops
from phi3v_train.hd_transform import CROP, hd_layout, num_image_tokens
from phi3v_train.methods import (
    Precision,
    TrainingModel,
    choose_precision,
    prepare,
    read_model_config,
)
from phi3v_train.modeling_phi3_v import Phi3VForCausalLM
from phi3v_train.optimizer import make_optimizer
from phi3v_train.peaks import peak_flops
from phi3v_train.tiny import init_tiny

FORMULA = (
    "2 x weights x tokens for linear layers (logits at labels only), 2 x T^2 x width for causal "
    "attention, per layer; CLIP on every crop; x 3 where weights train, x 2 where gradients only "
    "pass, x 1 before; recomputed operations don't count"
)

NUM_TEXT_TOKENS = 28
NUM_LABEL_TOKENS = 10


@dataclass(frozen=True, slots=True)
class BenchResult:
    """What was measured."""

    device: str
    num_devices: int
    engine: str
    method: str
    precision: str
    gradient_checkpointing: bool
    optimizer: str
    row_tokens: int
    """Tokens of a row."""
    sample_tokens: int
    samples_per_row: int
    crops_per_row: int
    """That the vision tower runs, global views included."""
    images_per_row: int
    rows_per_step: int
    """On each device."""
    seconds: tuple[float, ...]
    """Of every measured step."""
    images_per_second: float
    """Of all devices; likewise below."""
    tokens_per_second: float
    flops_per_step: float
    """Operations that the model needs, of all devices."""
    peak_flops: float | None
    """Of a device; None: not known."""
    mfu: float | None
    peak_bytes: int
    """Allocated on the device when most was; on a CPU, of the whole process."""
    reserved_bytes: int | None
    """Taken from the device by torch's allocator; None on a CPU."""
    versions: dict[str, str]
    formula: str = FORMULA

    @property
    def step_seconds(self) -> float:
        """The median."""
        return statistics.median(self.seconds)

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON would have it."""
        return {**asdict(self), "step_seconds": self.step_seconds}


def run_bench(config: TrainConfig, *, num_steps: int = 10, num_warmup: int = 3) -> BenchResult:
    """Train on made-up rows for a few steps.

    Args:
        config: of the run to be measured; its data and output are not touched.
        num_steps: measured steps.
        num_warmup: steps before them.

    Raises:
        ValueError: a row too short for a sample, or a model that isn't known.
    """
    world = join_world(config.device)
    # transformers loads DeepSpeed where it is installed, which else looks for a device and says
    # so on standard output, into the JSON
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    try:
        return _run(config, world, num_steps, num_warmup)
    finally:
        world.leave()


def _run(config: TrainConfig, world: World, num_steps: int, num_warmup: int) -> BenchResult:
    model_config = model_sizes(config.model)
    precision = choose_precision(config.precision, world.device)
    parallel = choose_engine(config, model_config, precision, world)
    training = random_training(
        model_config,
        config,
        precision,
        world.device,
        is_shared=parallel.engine not in ("single", "ddp"),
    )
    engine = make_engine(
        parallel,
        training,
        world,
        lambda trainable: make_optimizer(trainable, config.optim),
        max_grad_norm=config.optim.max_grad_norm,
    )
    training.model.train()
    rows = made_up_rows(config, model_config, world.world_size)
    if world.device.type == "cuda":
        rows = [_pinned(row) for row in rows]
    for _ in range(num_warmup):
        _step(engine, rows, world)
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    seconds = tuple(_step(engine, rows, world) for _ in range(num_steps))
    work = sum((Work.of_row(row) for row in rows), NO_WORK)
    flops = training_flops(model_config, config.method, work) * world.world_size
    on_gpu = world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if on_gpu else "cpu"
    peak = peak_flops(device, precision)
    median = statistics.median(seconds)
    first = rows[0]
    return BenchResult(
        device=device,
        num_devices=world.world_size,
        engine=parallel.engine,
        method=_method(config),
        precision=precision,
        gradient_checkpointing=config.method.gradient_checkpointing,
        optimizer=config.optim.name,
        row_tokens=len(first.input_ids),
        sample_tokens=first.max_seqlen,
        samples_per_row=len(first.sample_ids),
        crops_per_row=Work.of_row(first).num_crops,
        images_per_row=len(first.crop_grid),
        rows_per_step=len(rows),
        seconds=seconds,
        images_per_second=len(rows) * len(first.crop_grid) * world.world_size / median,
        tokens_per_second=work.num_tokens * world.world_size / median,
        flops_per_step=flops,
        peak_flops=peak,
        mfu=None if peak is None else flops / (median * peak * world.world_size),
        peak_bytes=_peak_bytes(world.device),
        reserved_bytes=torch.cuda.max_memory_reserved(world.device) if on_gpu else None,
        versions={"python": sys.version.split()[0], "torch": torch.__version__},
    )


def _step(engine: Engine, rows: list[Batch], world: World) -> float:
    """One optimizer step; its seconds, those of the slowest rank."""
    _synchronise(world)
    started = time.perf_counter()
    labels = world.world_size * sum(row.num_label_tokens for row in rows)
    for number, row in enumerate(rows):
        is_last = number == len(rows) - 1
        loss = engine.loss_sum(row, is_last=is_last)
        engine.backward(loss * (world.world_size / labels), is_last=is_last)
    engine.step()
    _synchronise(world)
    return time.perf_counter() - started


def _synchronise(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    world.barrier()


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def _method(config: TrainConfig) -> str:
    method = config.method
    words = method.name
    if method.has_adapters:
        words += f", rank {method.lora.rank}, on {' and '.join(method.adapter_parts)}"
    if method.freeze:
        words += f", {' and '.join(method.freeze)} frozen"
    return words


# --- the model ------------------------------------------------------------------------------------


def model_sizes(model: Path) -> Phi3VConfig:
    """The sizes of a model folder, or those that the words `phi-3.5-vision` and `tiny` stand for.

    Raises:
        ValueError: neither.
    """
    if (model / "config.json").is_file():
        return read_model_config(model)
    if str(model) == "phi-3.5-vision":
        # the published factors don't change what is computed, only with what numbers
        ones = [1.0] * 48
        fields: dict[str, Any] = {
            "rope_scaling": {"type": "su", "short_factor": ones, "long_factor": ones}
        }
        return Phi3VConfig(**fields)
    if str(model) == "tiny":
        with tempfile.TemporaryDirectory() as folder:
            return read_model_config(init_tiny(Path(folder) / "tiny").path)
    raise ValueError(
        f"model={model} is no model folder; name one that has a config.json (weights need not be "
        "there), or phi-3.5-vision, or tiny"
    )


def random_training(
    model_config: Phi3VConfig,
    config: TrainConfig,
    precision: Precision,
    device: torch.device,
    *,
    is_shared: bool,
) -> TrainingModel:
    """A model of these sizes with random weights, ready to train as the configuration says.

    Weights of full training are float32, those under adapters in the precision of computing. They
    are born on the device, or on the host where a device is not to hold all of them at once.

    Args:
        model_config: sizes.
        config: its method and seed count.
        precision: of computing.
        device: where it trains.
        is_shared: the engine gives every device a share of the weights.
    """
    method = config.method
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    torch.manual_seed(config.seed)
    with torch.device("meta"):
        model = Phi3VForCausalLM(model_config)
    nn.Module.to(model, dtype=dtype if method.has_adapters else torch.float32)
    model.to_empty(device="cpu" if is_shared or method.name == "qlora" else device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return prepare(model, method, precision, seed=config.seed, device=device)


# --- the rows -------------------------------------------------------------------------------------


def made_up_rows(config: TrainConfig, model_config: Phi3VConfig, world_size: int) -> list[Batch]:
    """Rows of one rank for one step, all alike.

    Raises:
        ValueError: not one image fits a row.
    """
    capacity, crops = config.data.max_tokens_per_row, config.data.num_crops
    is_video = crops <= 4
    grid = hd_layout(*((320, 240) if is_video else (1275, 1650)), crops).grid
    per_image, text = num_image_tokens(*grid), NUM_TEXT_TOKENS + NUM_LABEL_TOKENS
    if per_image + text > capacity:
        raise ValueError(
            f"data.max_tokens_per_row: a sample with one image of {crops} crops has "
            f"{per_image + text} tokens, got rows of {capacity}; raise it, or lower data.num_crops"
        )
    num_images = min(8, (capacity - text) // per_image) if is_video else 1
    length = num_images * per_image + text
    per_row = capacity // length
    batch = config.train.global_batch_size
    rows = max(1, math.ceil(batch / per_row / world_size))
    per_row = min(per_row, max(1, math.ceil(batch / rows / world_size)))
    row = collate(
        [_sample(number, grid, num_images, length, model_config) for number in range(per_row)]
    )
    return [row] * rows


def _sample(
    number: int, grid: tuple[int, int], num_images: int, length: int, model_config: Phi3VConfig
) -> EncodedSample:
    random = np.random.default_rng(number)
    num_slots = num_images * num_image_tokens(*grid)
    ids = random.integers(3, model_config.vocab_size // 2, length)
    ids[1 : 1 + num_slots] = model_config.image_token_id
    labels = np.full(length, -100)
    labels[-NUM_LABEL_TOKENS:] = ids[-NUM_LABEL_TOKENS:]
    crops = (num_images * grid[0] * grid[1], 3, CROP, CROP)
    return EncodedSample(
        sample_id=f"made up {number}",
        input_ids=ids,
        labels=labels,
        crops=random.integers(0, 256, crops, dtype=np.uint8),
        crop_grid=np.array([grid] * num_images, dtype=np.int32),
    )


def _pinned(row: Batch) -> Batch:
    return replace(row, pixel_values=row.pixel_values.pin_memory())


# --- printing -------------------------------------------------------------------------------------


def print_bench(result: BenchResult, console: Console) -> None:
    """Show what was measured, with everything that makes the numbers comparable."""
    low, high = min(result.seconds), max(result.seconds)
    recompute = "recomputed" if result.gradient_checkpointing else "kept"
    memory = f"{result.peak_bytes / 2**30:.2f} GiB"
    if result.reserved_bytes is None:
        memory += " (whole process)"
    else:
        memory += f" allocated, {result.reserved_bytes / 2**30:.2f} GiB reserved"
    if result.peak_flops is None:
        mfu = f"not known: there is no peak of {result.device} in {result.precision}"
    else:
        mfu = f"{result.mfu:.1%} of {result.peak_flops / 1e12:.0f} TFLOP/s"
    rows = {
        "devices": f"{result.num_devices} x {result.device}, {result.engine}, {result.precision}",
        "method": f"{result.method}; {result.optimizer}; activations {recompute}",
        "row": f"{result.row_tokens:,} tokens: {result.samples_per_row} samples of "
        f"{result.sample_tokens:,}, {result.images_per_row} images, {result.crops_per_row} crops",
        "step": f"{result.rows_per_step} rows a device, {result.step_seconds:.3f} s "
        f"(median of {len(result.seconds)}; {low:.3f} to {high:.3f})",
        "speed": f"{result.images_per_second:,.2f} images/s, "
        f"{result.tokens_per_second:,.0f} tokens/s, {result.num_devices} devices together",
        "memory": memory,
        "MFU": mfu,
        "operations": f"{result.flops_per_step / 1e12:,.3f} TFLOP a step: {result.formula}",
        "versions": ", ".join(f"{name} {value}" for name, value in result.versions.items()),
    }
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, value in rows.items():
        table.add_row(Text(name), Text(value))
    console.print(table)
