"""Toy data and runs that the tests of training share."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from phi3v_data import Sample, ShardReader, Turn, open_shards, write_samples, write_shards
from phi3v_train.chat import ChatEncoder
from phi3v_train.collator import SampleEncoder
from phi3v_train.config import TrainConfig, load_config
from phi3v_train.methods import load_model
from phi3v_train.modeling_phi3_v import Phi3VForCausalLM
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor


def make_sample(name: str, *turns: tuple[Sequence[str], str, str]) -> Sample:
    """A sample of (images, user, assistant) turns."""
    return Sample(
        id=name,
        source="toy",
        conversations=tuple(Turn(images=tuple(i), user=u, assistant=a) for i, u, a in turns),
    )


def write_picture(path: Path, size_wh: tuple[int, int], seed: int = 0) -> None:
    """A picture of noise; the end of its name says which kind."""
    width, height = size_wh
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def make_shards(folder: Path, samples: Sequence[Sample]) -> Path:
    """Shards of samples; their pictures are drawn, each by its name."""
    names = sorted({name for sample in samples for name in sample.images})
    for seed, name in enumerate(names):
        write_picture(folder / "images" / name, (80, 60) if seed % 2 else (60, 80), seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_samples(folder / "train.jsonl", samples)
    write_shards([folder / "train.jsonl"], folder / "shards", num_workers=1)
    return folder / "shards"


def toy_samples(count: int = 12) -> list[Sample]:
    """Samples of no, one and two images in turn, PNG and JPEG, texts of many lengths."""
    samples: list[Sample] = []
    for number in range(count):
        images = [(), (f"{number}.png",), (f"{number}.jpg", f"{number}-b.png")][number % 3]
        question = "What is it? " + "Look again. " * (number % 4)
        samples.append(make_sample(f"s{number}", (images, question, f"Thing {number}.")))
    return samples


def open_toy(model: Path, shards: Path, num_crops: int = 1) -> tuple[SampleEncoder, ShardReader]:
    """The encoder of a model folder, and the reader of a shard directory."""
    return SampleEncoder(ChatEncoder(model), num_crops), open_shards(shards)


def fresh_model(folder: Path) -> Phi3VForCausalLM:
    """The model of a folder, in evaluation mode."""
    return load_model(folder).eval()


def toy_overrides(model: Path, shards: Path, output_dir: Path, *more: str) -> list[str]:
    """Settings of a run of six steps (two epochs of twelve samples), as on a command line."""
    return [
        f"model={model}",
        f"output_dir={output_dir}",
        f"data.train={shards}",
        "device=cpu",
        "data.num_crops=1",
        "data.num_workers=0",
        "log.report=false",
        "log.tensorboard=false",
        "train.global_batch_size=4",
        "train.num_epochs=2",
        "train.log_every=1",
        "optim.learning_rate=1e-3",
        "optim.warmup_steps=2",
        "method.lora.rank=4",
        *more,
    ]


def toy_config(model: Path, shards: Path, output_dir: Path, *more: str) -> TrainConfig:
    """The same as a configuration."""
    return load_config(None, toy_overrides(model, shards, output_dir, *more))


def log_lines(output_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]


def losses_of(output_dir: Path) -> list[float]:
    """Its losses, one a line."""
    return [line["loss"] for line in log_lines(output_dir)]


def weights_of(output_dir: Path) -> dict[str, Tensor]:
    """The weights that a finished run wrote."""
    adapter = output_dir / "adapter" / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else output_dir / "model" / "model.safetensors")
