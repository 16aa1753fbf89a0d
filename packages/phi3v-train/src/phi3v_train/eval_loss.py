"""How well a model foresees the answers of a data set: the mean loss of their tokens.

    rows = open_eval_rows("shards/val", encoder, ...)
    loss = evaluate_loss(rows, engine.loss_sum, world)      # 0.7412, nats per label token

Teacher-forced: every token is predicted from the true ones before it, so it takes one forward pass
a sample and no generation. Samples are packed and dealt to the ranks as in training, each once; the
sum over all label tokens is divided by their number, so that neither packing nor the number of
ranks changes it.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from phi3v_train.collator import Batch, SampleEncoder
from phi3v_train.engine import World
from phi3v_train.sources import Source, open_sources
from phi3v_train.stream import StreamSettings, TrainStream, measure_sources

ROWS_A_STEP = 8
"""Rows that a rank gets at once, about: enough to deal them evenly, few enough to begin soon."""


class LossSum(Protocol):
    """`Engine.loss_sum`."""

    def __call__(self, batch: Batch, *, is_last: bool) -> Tensor:
        """The sum of the losses at the label positions of a row."""
        ...


def open_eval_rows(
    shards: str | Path,
    encoder: SampleEncoder,
    settings: StreamSettings,
    *,
    limit: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> TrainStream:
    """Open a shard directory for `evaluate_loss`.

    Args:
        shards: with answers.
        encoder: that of training.
        settings: of training: capacity of a row, ranks, workers. A sample longer than a row gets a
            row of its own.
        limit: only the first so many samples.
        on_progress: called with the number of samples measured so far, and that of all.

    Raises:
        ValueError: not shards, or a sample without an answer; the message names it.
    """
    sources = open_sources([Source(shards)])
    measures = measure_sources(sources, encoder, on_progress)
    count = len(sources) if limit is None else min(limit, len(sources))
    longest = int(measures.num_tokens[:count].max())
    mean = max(1.0, float(measures.num_tokens[:count].mean()))
    capacity = max(settings.max_tokens_per_row, longest)
    samples_a_step = max(1, int(capacity / mean)) * ROWS_A_STEP * settings.world_size
    own = replace(
        settings,
        max_tokens_per_row=capacity,
        global_batch_size=min(samples_a_step, count),
        global_batch_unit="samples",
        num_epochs=1,
        seed=0,
        overlong="error",
        temperature=1.0,
        epoch_size=None,
        window_bytes=0,
        first=count,
    )
    return TrainStream(sources, encoder, measures, own)


@torch.no_grad()
def evaluate_loss(rows: TrainStream, loss_sum: LossSum, world: World) -> float:
    """The mean loss of the answers' tokens, the same on every rank.

    Args:
        rows: of `open_eval_rows`.
        loss_sum: a forward pass of the model, which is in evaluation mode.
        world: the ranks; all of them call this.

    Raises:
        ValueError: a sample that cannot be read; the message names it.
    """
    total, count = 0.0, 0
    steps = rows.steps()
    with closing(steps):
        for _, batches in steps:
            for batch in batches:
                total += float(loss_sum(batch, is_last=False))
                count += batch.num_label_tokens
    total, num_tokens = world.sum(total, count)
    return total / num_tokens
