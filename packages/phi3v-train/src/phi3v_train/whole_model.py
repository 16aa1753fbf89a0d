"""A whole copy of a model whose weights are shared out over the ranks.

    skeleton = model_skeleton(training)       # before sharding: its structure, without weights
    ...
    whole = filled(skeleton, {"model.layers.0.…weight": tensor, …})

To generate, ranks run different numbers of forward passes, which a sharded model can't: each pass
is a meeting of all ranks. So evaluation and export get a model of its own.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from phi3v_train.methods import TrainingModel, move


def model_skeleton(training: TrainingModel) -> TrainingModel:
    """The same model and adapters with parameters and buffers on the meta device."""
    known: dict[int, object] = {}
    for parameter in training.model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        known[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    model, adapters = copy.deepcopy((training.model, training.adapters), known)
    return replace(training, model=model, adapters=adapters)


def filled(skeleton: TrainingModel, weights: Mapping[str, Tensor]) -> TrainingModel:
    """A copy of the skeleton that holds these weights.

    Args:
        skeleton: of `model_skeleton`.
        weights: every parameter of the model, by name.
    """
    model, adapters = copy.deepcopy((skeleton.model, skeleton.adapters))
    for name, parameter in list(model.named_parameters()):
        place, _, own_name = name.rpartition(".")
        setattr(
            model.get_submodule(place),
            own_name,
            nn.Parameter(weights[name], requires_grad=parameter.requires_grad),
        )
    move(model, next(model.parameters()).device)  # the buffers too
    return replace(skeleton, model=model, adapters=adapters)
