"""Which optimizer, with which learning rate and weight decay for which weights.

    optimizer = make_optimizer(training.trainable, config.optim)
    rate = set_learning_rate(optimizer, config.optim, step, num_steps)     # before every step

A group has the weights of one part of the model that decay alike. Its `rate_ratio` is its peak
rate over `optim.learning_rate`: all groups follow one schedule.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from phi3v_train.config import OptimConfig, Part
from phi3v_train.model_parts import part_of
from phi3v_train.schedule import learning_rate


def parameter_groups(
    trainable: Mapping[str, nn.Parameter], optim: OptimConfig
) -> list[dict[str, Any]]:
    """Sort what trains into groups.

    Args:
        trainable: by official name.
        optim: rates and decay.

    Returns:
        Groups as torch's optimizers take them, in a fixed order, none empty: `params`, `lr`,
        `rate_ratio`, `weight_decay`.
    """
    sorted_by: dict[tuple[Part, bool], list[nn.Parameter]] = {}
    for name, parameter in trainable.items():
        decays = optim.decay_on == "all" or is_matrix(parameter)
        sorted_by.setdefault((part_of(name), decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": optim.peak_rate(part),
            "rate_ratio": optim.peak_rate(part) / optim.learning_rate,
            "weight_decay": optim.weight_decay if decays else 0.0,
        }
        for (part, decays), parameters in sorted(sorted_by.items(), key=lambda item: item[0])
    ]


def is_matrix(parameter: nn.Parameter) -> bool:
    """Whether it is one; norms, biases and separators, of shape (1, 1, 1, H), are vectors."""
    return parameter.dim() == 2 or sum(size > 1 for size in parameter.shape) > 1


def make_optimizer(
    trainable: Mapping[str, nn.Parameter], optim: OptimConfig
) -> torch.optim.Optimizer:
    """The optimizer that `optim.name` says.

    Args:
        trainable: by official name, on the device where they are updated.
        optim: its settings.

    Raises:
        ValueError: weights in shares for an optimizer that can't update them.
    """
    groups = parameter_groups(trainable, optim)
    if optim.name == "adamw8bit":
        if any(isinstance(parameter, DTensor) for parameter in trainable.values()):
            raise ValueError(
                "optim.name=adamw8bit scales moments in blocks of whole tensors, and this engine "
                "keeps weights in shares; use optim.name=adamw, or another parallel.engine"
            )
        from phi3v_train.quantized import adamw8bit

        return adamw8bit(groups, optim)
    return torch.optim.AdamW(
        groups,
        lr=optim.learning_rate,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        # The default on a GPU goes over all tensors at once, operation by operation, with copies
        # as large as the weights: 16 GB for full training.
        fused=True if all(p.is_cuda for p in trainable.values()) else None,
    )


def set_learning_rate(
    optimizer: torch.optim.Optimizer, optim: OptimConfig, step: int, num_steps: int
) -> float:
    """Set every group's rate for a step.

    Args:
        optimizer: over groups of `parameter_groups`.
        optim: the schedule.
        step: from 0.
        num_steps: of the whole run.

    Returns:
        The rate of parts without one of their own.
    """
    rate = learning_rate(optim, step, num_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_ratio"]
    return rate
