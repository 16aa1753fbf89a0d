"""The learning rate of a step: a pure function, so a resumed run needs no scheduler state."""

import math

from phi3v_train.config import OptimConfig


def learning_rate(optim: OptimConfig, step: int, num_steps: int) -> float:
    """The rate of one optimizer step.

    Args:
        optim: rate after warm-up, warm-up length and kind of decay.
        step: from 0.
        num_steps: steps of the whole run.

    Returns:
        Rising over the warm-up from `learning_rate / warmup_steps` to `learning_rate`, then
        falling so that the step after the last would have rate 0 (or level, for `constant`).
    """
    if step < optim.warmup_steps:
        return optim.learning_rate * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.learning_rate
    left = (num_steps - step) / max(1, num_steps - optim.warmup_steps)
    if optim.schedule == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    return optim.learning_rate * left
