"""Gradient checkpointing as transformers turns it on: same gradients, less kept in between."""

import warnings
from typing import Any

import pytest
import torch
from phi3v_train.modeling_phi3_v import Phi3VForCausalLM
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.train.small_models import Prompt, gradients, packed_row, small_model

ROW = packed_row(Prompt(12, ((1, 2),), seed=1), Prompt(10, seed=2))


def enable(model: Any, settings: dict[str, Any] | None = None) -> None:
    """By the name of this release; the older one warns, and is the only one before 5.20 or so."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(settings)
    else:
        model.gradient_checkpointing_enable(settings)


def kept_between(model: Phi3VForCausalLM) -> int:
    """Numbers that the forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.packed_loss(ROW)
    return sum(kept.values())


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["default", "new", "reentrant"])
def test_gradients_are_equal(reentrant: bool | None) -> None:
    expected_loss, expected = gradients(small_model().train(), ROW)
    model = small_model().train()
    enable(model, None if reentrant is None else {"use_reentrant": reentrant})
    loss, found = gradients(model, ROW)
    assert torch.equal(loss, expected_loss)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_by_default_it_is_not_reentrant() -> None:
    model = small_model().train()
    enable(model)
    tower: Any = model.model.vision_embed_tokens.img_processor.vision_model
    for owner in (model.model, tower):
        function = owner._gradient_checkpointing_func
        assert function.func is checkpoint
        assert function.keywords["use_reentrant"] is False


@pytest.mark.parametrize("part", ["decoder", "vision"])
def test_it_reaches_the_decoder_and_the_vision_tower(part: str) -> None:
    """Each layer runs twice, but the vision layer that is never computed."""
    model = small_model().train()
    tower: Any = model.model.vision_embed_tokens.img_processor.vision_model
    layers: Any = model.model.layers if part == "decoder" else tower.encoder.layers
    calls = [0] * len(layers)

    def count(number: int) -> Any:
        def hook(*_: Any) -> None:
            calls[number] += 1

        return hook

    for number, layer in enumerate(layers):
        layer.mlp.register_forward_pre_hook(count(number))
    enable(model)
    gradients(model, ROW)
    assert calls == ([2, 2] if part == "decoder" else [2, 2, 0])


def test_less_is_kept_between_the_passes() -> None:
    plain, checkpointed = small_model().train(), small_model().train()
    enable(checkpointed)
    assert kept_between(checkpointed) < 0.5 * kept_between(plain)


def test_it_is_off_in_evaluation_and_after_it_is_disabled() -> None:
    model = small_model()
    enable(model)
    plain = kept_between(small_model())
    assert kept_between(model) == plain
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_disable()
    assert kept_between(model.train()) == plain
