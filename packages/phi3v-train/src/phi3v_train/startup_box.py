"""What is about to run, in a box.

    ╭─ phi3v-train ────────────────────────────────────────────────────────────────╮
    │ model      models/phi-3.5-vision (4,146,621,440 parameters)                   │
    │ method     lora, rank 64, alpha 128, bf16                                     │
    │ trainable  ... (2.5%): vision ..., projector ..., llm ...                     │
    │ devices    8 x NVIDIA A100-SXM4-80GB, ddp                                     │
    │ data       10,194 samples an epoch, ...                                       │
    │ batch      16 samples a step = 8 devices x 1 row of up to 8,192 tokens ...    │
    │ ...                                                                           │
    ╰───────────────────────────────────────────────────────────────────────────────╯

Everything in it is known before the first step, and `--dry_run` shows the same.
"""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch import nn

from phi3v_train.config import Part, TrainConfig
from phi3v_train.engine import World
from phi3v_train.model_parts import part_of
from phi3v_train.stream import TrainStream


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """How many parameters there are, and how many of them train, by part of the model."""

    total: dict[Part, int]
    trainable: dict[Part, int]

    def __str__(self) -> str:
        total, trained = sum(self.total.values()), sum(self.trainable.values())
        parts = ", ".join(
            f"{part} {self.trainable[part]:,} of {count:,}" for part, count in self.total.items()
        )
        return f"{trained:,} ({trained / total:.1%}): {parts}"


def count_parameters(named: Iterable[tuple[str, nn.Parameter]]) -> ParameterCounts:
    """Count the parameters of a model by its names; take it before an engine splits them up.

    Args:
        named: `model.named_parameters()`, adapters included.
    """
    total: dict[Part, int] = {"vision": 0, "projector": 0, "llm": 0}
    trainable = dict.fromkeys(total, 0)
    for name, parameter in named:
        count = _num_values(parameter)
        total[part_of(name)] += count
        trainable[part_of(name)] += count if parameter.requires_grad else 0
    return ParameterCounts(total, trainable)


def _num_values(parameter: nn.Parameter) -> int:
    """Weights in a tensor; bitsandbytes keeps two 4-bit ones in a byte, and the shape apart."""
    packed: Any = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else math.prod(packed.shape)


def describe_run(
    config: TrainConfig,
    world: World,
    stream: TrainStream,
    counts: ParameterCounts,
    *,
    precision: str,
    num_steps: int,
    engine: str | None = None,
) -> dict[str, str]:
    """The rows of the box.

    Args:
        config: the run.
        world: its devices.
        stream: its data.
        counts: of the model.
        precision: `fp32`, `bf16` or `fp16`.
        num_steps: of the whole run.
        engine: what joins the devices, where it is worth a word.
    """
    return {
        "model": f"{config.model} ({sum(counts.total.values()):,} parameters)",
        "method": f"{_method(config)}, {precision}",
        "trainable": str(counts),
        "devices": _devices(world) + (f", {engine}" if engine else ""),
        **_data(config, stream, num_steps),
        "output": str(config.output_dir),
    }


def _method(config: TrainConfig) -> str:
    method = config.method
    words = method.name
    if method.has_adapters:
        words += f", rank {method.lora.rank}, alpha {method.lora.lora_alpha}"
    if method.has_adapters and method.full_parts:
        words += f", all of {' and '.join(method.full_parts)}"
    if method.freeze:
        words += f", {' and '.join(method.freeze)} frozen"
    if method.gradient_checkpointing:
        words += ", gradient checkpointing"
    return words


def _devices(world: World) -> str:
    kind = world.device.type
    if kind == "cuda":
        kind = torch.cuda.get_device_name(world.device)
    return f"{world.world_size} x {kind}"


def _data(config: TrainConfig, stream: TrainStream, num_steps: int) -> dict[str, str]:
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
    unit = config.train.global_batch_unit.replace("_", " ")
    ranks, capacity = stream.settings.world_size, config.data.max_tokens_per_row
    num_rows = summary.num_rows + summary.num_empty_rows
    per_rank = num_rows / summary.num_steps / ranks
    rows["batch"] = (
        f"{config.train.global_batch_size:,} {unit} a step = {_count(ranks, 'device')} x "
        f"{_count(per_rank, 'row')} of up to {capacity:,} tokens x "
        f"{_count(summary.num_samples / max(summary.num_rows, 1), 'sample')}"
    )
    rows["rows"] = (
        f"{summary.num_rows:,} an epoch, {summary.utilisation:.0%} of "
        f"{capacity:,} tokens full; {summary.num_empty_rows:,} empty ones"
    )
    rows["balance"] = (
        f"{summary.balance:.1%}; tokens by rank {_spread(summary.tokens_per_rank)}, "
        f"crops {_spread(summary.crops_per_rank)}"
    )
    rows["steps"] = (
        f"{num_steps:,} of {config.train.global_batch_size:,} {unit} each; "
        f"{stream.steps_per_epoch:,} an epoch"
    )
    return rows


def _count(value: float, thing: str) -> str:
    shown = f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
    return f"{shown} {thing}{'' if shown == '1' else 's'}"


def _spread(counts: Sequence[int]) -> str:
    """`1,200`, or `1,150 to 1,250` over the ranks."""
    least, most = min(counts), max(counts)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def print_box(rows: Mapping[str, str]) -> None:
    """Print names and values in a box, on standard output."""
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(Text(name, style="bold"), Text(value))
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 100)
    console.print(Panel(table, title="phi3v-train", title_align="left", expand=False))
