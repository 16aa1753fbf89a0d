"""Small models made ready by a method, and a step of them; shared by the tests of methods."""

from typing import Any

import torch
from phi3v_train.config import MethodConfig, OptimConfig
from phi3v_train.methods import Precision, TrainingModel, prepare
from phi3v_train.optimizer import make_optimizer
from torch import Tensor

from tests.train.small_models import Prompt, call_inputs, packed_row, small_model

torch.set_num_threads(1)  # more of them wait for each other on models this small

PROMPTS = (Prompt(12, ((1, 1),), seed=1), Prompt(10, (), seed=2))
ROW = packed_row(*PROMPTS)
TEXT_ROW = packed_row(Prompt(10, (), seed=2), Prompt(14, (), seed=3))

LORA = {"name": "lora", "lora": {"rank": 4}}
QLORA = {"name": "qlora", "lora": {"rank": 4}}
MIXED = {"name": "lora", "lora": {"rank": 4, "full": ["vision", "projector"]}}
"""Adapters on the language model, all of the rest in full."""


def prepared(method: dict[str, Any], precision: Precision = "fp32") -> TrainingModel:
    """A small model, the same one every time, made ready."""
    return prepare(small_model(), MethodConfig.model_validate(method), precision)


def step(training: TrainingModel, row: Any = ROW, rate: float = 1e-2) -> float:
    """One update, and the loss before it; every tensor that trains must get a gradient."""
    optimizer = make_optimizer(training.trainable, OptimConfig(learning_rate=rate))
    dtype = training.autocast_dtype
    device = training.model.device
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        loss = training.model.train().packed_loss(row.to(device)) / row.num_label_tokens
    loss.backward()
    assert [name for name, p in training.trainable.items() if p.grad is None] == []
    optimizer.step()
    return float(loss.detach())


def logits_of(model: Any) -> Tensor:
    """Of both prompts, pictures included."""
    with torch.no_grad():
        return model.eval()(**call_inputs(*PROMPTS)).logits
