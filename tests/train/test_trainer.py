import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from phi3v_data import Sample, Turn, write_samples, write_shards
from phi3v_train.config import TrainConfig, load_config
from phi3v_train.tiny import init_tiny
from phi3v_train.trainer import train
from PIL import Image
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and shards of twelve samples, every third without an image."""
    folder = tmp_path_factory.mktemp("work")
    init_tiny(folder / "tiny")
    random = np.random.default_rng(0)
    samples: list[Sample] = []
    for number in range(12):
        images = () if number % 3 == 0 else (f"{number}.png",)
        for name in images:
            pixels = random.integers(0, 256, (60, 80, 3), dtype=np.uint8)
            (folder / "images").mkdir(exist_ok=True)
            Image.fromarray(pixels).save(folder / "images" / name)
        turn = Turn(images=images, user="What is it?", assistant=f"Thing {number}.")
        samples.append(Sample(id=f"s{number}", source="toy", conversations=(turn,)))
    write_samples(folder / "train.jsonl", samples)
    write_shards([folder / "train.jsonl"], folder / "shards")
    return folder


def config_of(work: Path, output_dir: Path, *overrides: str) -> TrainConfig:
    return load_config(
        None,
        [
            f"model={work / 'tiny'}",
            f"output_dir={output_dir}",
            f"data.train={work / 'shards'}",
            "data.num_crops=1",
            "data.num_workers=0",
            "train.global_batch_size=4",
            "train.num_epochs=2",
            "train.log_every=1",
            "optim.learning_rate=1e-3",
            "optim.warmup_steps=2",
            "checkpoint.every_steps=2",
            "checkpoint.keep=9",
            *overrides,
        ],
    )


@pytest.mark.parametrize(
    ("method", "weights"),
    [
        ("full", "model/model.safetensors"),
        ("lora", "adapter/adapter_model.safetensors"),
    ],
)
def test_two_steps_a_resume_and_the_rest_equal_the_uninterrupted_run_bitwise(
    work: Path, tmp_path: Path, method: str, weights: str
) -> None:
    options = (f"method.name={method}", "method.lora.rank=4", "method.lora.dropout=0.1")
    whole = train(config_of(work, tmp_path / "whole", *options))
    assert (whole.step, whole.num_steps) == (6, 6)
    checkpoints = tmp_path / "resumed" / "checkpoints"
    name = "step-00000002"
    shutil.copytree(tmp_path / "whole" / "checkpoints" / name, checkpoints / name)
    (checkpoints / "latest").write_text(f"{name}\n")
    assert train(config_of(work, tmp_path / "resumed", *options), resume=True).step == 6
    expected, resumed = (load_file(tmp_path / run / weights) for run in ("whole", "resumed"))
    assert expected.keys() == resumed.keys()
    for key, tensor in expected.items():
        assert torch.equal(tensor, resumed[key]), key


def test_rows_of_another_capacity_give_the_same_losses(work: Path, tmp_path: Path) -> None:
    import json

    losses: list[list[float]] = []
    for capacity in (400, 8192):
        output = tmp_path / str(capacity)
        train(config_of(work, output, f"data.max_tokens_per_row={capacity}"))
        lines = (output / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
