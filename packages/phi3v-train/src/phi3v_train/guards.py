"""What must not go unnoticed in a step: parameters that never train, and losses that are no number.

guard_gradients(engine)              # after the first backward pass of a run
raise ValueError(explain_non_finite(engine, rows, losses, step=step, reseed=reseed))

step 7, rank 1: the loss is nan on samples a-12, a-40; the first module whose output is not
finite is model.layers.3.mlp.down_proj; ...
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from phi3v_train.collator import Batch
from phi3v_train.engine import Engine

MOST_NAMED = 5
"""Parameters listed where many have the same problem."""


def guard_gradients(engine: Engine) -> None:
    """After the first backward pass every parameter that trains has a gradient; zero is one.

    All ranks call it.

    Raises:
        ValueError: names those that have none.
    """
    missing = engine.without_gradient()
    if not missing:
        return
    shown = ", ".join(missing[:MOST_NAMED])
    if len(missing) > MOST_NAMED:
        shown += f" and {len(missing) - MOST_NAMED} more"
    raise ValueError(
        f"{len(missing)} of {len(engine.training.trainable)} trainable tensors got no gradient in "
        f"the first step and would never train: {shown}; freeze them, or report this"
    )


@dataclass(frozen=True, slots=True)
class _Finding:
    rank: int
    loss: float
    sample_ids: tuple[str, ...]
    module: str | None


def explain_non_finite(
    engine: Engine,
    rows: Sequence[Batch],
    losses: Sequence[Tensor],
    *,
    step: int,
    reseed: Callable[[int], None],
) -> str:
    """Say where a loss stopped being a number: runs the row again and watches every module.

    All ranks call it: those whose losses are fine run a row too, since a pass of an engine with
    shares is a meeting of all.

    Args:
        engine: its weights as they were in the step.
        rows: of the step on this rank.
        losses: a sum for each row.
        step: steps done before.
        reseed: sets the random state of a row, by its number.
    """
    bad = [number for number, loss in enumerate(losses) if not math.isfinite(float(loss))]
    number = bad[0] if bad else 0
    reseed(number)
    module = first_non_finite(engine, rows[number])
    own = None
    if bad:
        row, loss = rows[number], float(losses[number])
        own = _Finding(engine.world.rank, loss, row.sample_ids, module)
    found: list[_Finding | None] = engine.world.gather(own)
    first = next((finding for finding in found if finding is not None), None)
    if first is None:  # each is finite, their sum is not
        return f"step {step + 1}: the sum of the losses overflows; lower optim.learning_rate"
    where = (
        f"the first module whose output is not finite is {first.module}"
        if first.module is not None
        else "the output of every module is finite, so it is the loss itself"
    )
    return (
        f"step {step + 1}, rank {first.rank}: the loss is {first.loss} on samples "
        f"{', '.join(first.sample_ids)}; {where}; a lower optim.learning_rate or precision=fp32 "
        "may help, and the last checkpoint is as it was"
    )


def first_non_finite(engine: Engine, row: Batch) -> str | None:
    """Run a row and name the first module, in order of completion, that gives inf or nan."""
    with torch.no_grad(), _watching(engine.training.model) as found:
        engine.loss_sum(row, is_last=True)
    return found[0] if found else None


@contextmanager
def _watching(model: nn.Module) -> Iterator[list[str]]:
    """Yields the names of modules whose output was not finite, in order."""
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            is_float = isinstance(output, Tensor) and output.is_floating_point()
            if not found and is_float and not bool(output.isfinite().all()):
                found.append(name)

        return look

    handles = [
        module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
