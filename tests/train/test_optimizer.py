"""Rates and decay by group, and optimizers that do what AdamW does."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from phi3v_train.config import OptimConfig
from phi3v_train.model_parts import part_of
from phi3v_train.optimizer import is_matrix, make_optimizer, parameter_groups, set_learning_rate
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from tests.train.method_models import LORA, prepared
from tests.train.small_models import small_model

RATES = {"learning_rate": 4e-4, "vision_lr": 1e-4, "projector_lr": 8e-4}


def optim(**settings: Any) -> OptimConfig:
    return OptimConfig.model_validate(settings)


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


def tensors(**shapes: tuple[int, ...]) -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}


def run(settings: OptimConfig, steps: int = 5) -> tuple[list[Tensor], torch.optim.Optimizer]:
    """Weights after some steps on the same noise as gradients."""
    weights = tensors(large=(96, 64), small=(7, 5))
    optimizer = make_optimizer(weights, settings)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for weight in weights.values():
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
    return [weight.detach() for weight in weights.values()], optimizer


def test_parts_have_their_own_rates_and_one_schedule() -> None:
    settings = optim(**RATES, warmup_steps=2)
    model = small_model()
    optimizer = make_optimizer(named(model), settings)
    parts = {id(weight): part_of(name) for name, weight in named(model).items()}
    for step, share in enumerate([0.5, 1.0, 1.0, 0.75, 0.5, 0.25]):
        assert set_learning_rate(optimizer, settings, step, 6) == pytest.approx(4e-4 * share)
        for group in optimizer.param_groups:
            (part,) = {parts[id(weight)] for weight in group["params"]}
            peak = {"vision": 1e-4, "projector": 8e-4, "llm": 4e-4}[part]
            assert group["lr"] == pytest.approx(peak * share)


def test_every_weight_is_in_one_group() -> None:
    model = small_model()
    for decay_on in ("all", "matrices"):
        groups = parameter_groups(named(model), optim(decay_on=decay_on))
        listed = [id(weight) for group in groups for weight in group["params"]]
        assert sorted(listed) == sorted(id(weight) for weight in model.parameters())
        assert all(group["params"] for group in groups)


def test_everything_decays_as_in_the_recipe_unless_told_otherwise() -> None:
    groups = parameter_groups(named(small_model()), optim())
    assert {group["weight_decay"] for group in groups} == {0.01}


def test_norms_biases_and_separators_need_not_decay() -> None:
    model = small_model()
    groups = parameter_groups(named(model), optim(decay_on="matrices", weight_decay=0.1))
    decay = {id(w): group["weight_decay"] for group in groups for w in group["params"]}
    kept = {name for name, weight in named(model).items() if decay[id(weight)] == 0}
    assert all(
        name.endswith((".bias", "_GN", "class_embedding")) or "norm" in name or "layrnorm" in name
        for name in kept
    )
    for name in ("model.norm.weight", "model.vision_embed_tokens.sub_GN"):
        assert name in kept
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert decay[id(named(model)[name])] == 0.1
    assert set(decay.values()) == {0, 0.1}


def test_an_adapter_of_rank_one_is_a_matrix() -> None:
    training = prepared({**LORA, "lora": {"rank": 1}})
    assert all(is_matrix(weight) for weight in training.trainable.values())


def test_groups_change_nothing_but_rates_and_decay() -> None:
    settings = optim(learning_rate=1e-2, weight_decay=0.1)
    weights = tensors(large=(96, 64), small=(7, 5))
    plain = torch.optim.AdamW(
        weights.values(), lr=1e-2, betas=(0.9, 0.95), eps=1e-7, weight_decay=0.1
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for weight in weights.values():
            weight.grad = torch.randn(weight.shape, generator=generator)
        plain.step()
    for ours, expected in zip(run(settings)[0], weights.values(), strict=True):
        assert torch.equal(ours, expected)


def test_8_bit_moments_take_a_quarter_and_give_nearly_the_same_weights() -> None:
    settings: dict[str, Any] = {"learning_rate": 1e-2, "weight_decay": 0.1}
    expected, whole = run(optim(**settings))
    ours, optimizer = run(optim(**settings, name="adamw8bit"))
    start = [weight.detach() for weight in tensors(large=(96, 64), small=(7, 5)).values()]
    for found, wanted, before in zip(ours, expected, start, strict=True):
        moved = float((wanted - before).norm())
        assert float((found - wanted).norm()) < 0.05 * moved
    assert not torch.equal(ours[0], expected[0])

    def bytes_of(state: dict[str, Any], *names: str) -> int:
        return sum(state[name].nbytes for name in names)

    states = [next(iter(o.state.values())) for o in (optimizer, whole)]
    eight = bytes_of(states[0], "state1", "state2", "absmax1", "absmax2")
    assert eight < 0.26 * bytes_of(states[1], "exp_avg", "exp_avg_sq")


def test_8_bit_moments_of_weights_in_shares_are_refused() -> None:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        share = nn.Parameter(DTensor.from_local(torch.zeros(4, 4), mesh))
        with pytest.raises(ValueError, match=r"use optim\.name=adamw"):
            make_optimizer({"weight": share}, optim(name="adamw8bit"))
        make_optimizer({"weight": share}, optim())
    finally:
        dist.destroy_process_group()
