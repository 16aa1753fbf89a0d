from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from phi3v_train.config import TrainConfig
from phi3v_train.engine import World
from phi3v_train.methods import load_to_train
from phi3v_train.startup_box import count_parameters, describe_run
from phi3v_train.stream import StreamSettings, open_stream
from torch import nn

from tests.train.builders import fresh_model, toy_config


def box(tiny: Path, toy_shards: Path, config: TrainConfig, world_size: int = 1) -> dict[str, str]:
    settings = StreamSettings(
        num_crops=1,
        max_tokens_per_row=config.data.max_tokens_per_row,
        global_batch_size=4,
        num_epochs=2,
        seed=0,
        overlong="drop",
        world_size=world_size,
    )
    training = load_to_train(tiny, config.method, "fp32", seed=0, device=torch.device("cpu"))
    return describe_run(
        config,
        World(0, world_size, torch.device("cpu")),
        open_stream(toy_shards, tiny, settings),
        count_parameters(training.model.named_parameters()),
        precision="fp32",
        num_steps=6,
        engine="ddp",
    )


def test_parameters_are_counted_by_part_trained_or_not(tiny: Path) -> None:
    model = fresh_model(tiny)
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    counts = count_parameters(model.named_parameters())
    assert sum(counts.total.values()) == sum(p.numel() for p in model.parameters())
    assert counts.trainable == {"vision": 0, "projector": 0, "llm": model.lm_head.weight.numel()}
    assert str(counts).endswith(f"llm {counts.trainable['llm']:,} of {counts.total['llm']:,}")


def test_weights_in_four_bits_count_as_the_weights_they_stand_for() -> None:
    packed: Any = nn.Parameter(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = SimpleNamespace(shape=(8, 8))
    counts = count_parameters([("model.layers.0.mlp.down_proj.weight", packed)])
    assert counts.total["llm"] == 64


def test_the_box_says_model_method_devices_and_the_arithmetic_of_a_batch(
    tiny: Path, toy_shards: Path, tmp_path: Path
) -> None:
    options = ("method.name=lora", "method.lora.full=[projector]", "data.max_tokens_per_row=700")
    rows = box(tiny, toy_shards, toy_config(tiny, toy_shards, tmp_path, *options), world_size=2)
    assert rows["method"] == "lora, rank 4, alpha 8, all of projector, fp32"
    assert rows["devices"] == "2 x cpu, ddp"
    assert rows["batch"] == (
        "4 samples a step = 2 devices x 1.67 rows of up to 700 tokens x 1.2 samples"
    )
    assert rows["steps"] == "6 of 4 samples each; 3 an epoch"
    assert rows["trainable"].startswith("3")
    assert "% of 700 tokens full" in rows["rows"]


def test_samples_that_are_left_out_are_listed(tiny: Path, toy_shards: Path, tmp_path: Path) -> None:
    config = toy_config(tiny, toy_shards, tmp_path, "data.max_tokens_per_row=400")
    dropped = box(tiny, toy_shards, config)["dropped"]
    assert dropped.startswith("4 too long for a row: s2: ")
