"""A run's folder as a training leaves it, written by hand: for what reads it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from phi3v_data import Sample, Turn, write_samples, write_shards
from phi3v_train.predictions import Prediction, write_predictions
from PIL import Image

ATTACK = (
    "</script><script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'>"
    '"><svg onload="window.pwned = 1"><style>body { display: none }</style>{{policy}}'
)
CLASSES = ("archery", "biking", "diving")


def photo(file: Path, seed: int) -> None:
    """A smooth picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize((160, 120), Image.Resampling.BICUBIC).save(file)


def make_eval_shards(folder: Path, count: int) -> Path:
    """Shards of `count` samples of 1, 2 or 3 images, whose classes follow each other."""
    samples: list[Sample] = []
    for number in range(count):
        names = tuple(f"{number}.{k}.jpg" for k in range(1 + number % 3))
        for k, name in enumerate(names):
            photo(folder / "images" / name, number * 10 + k)
        turn = Turn(images=names, user=f"Which sport, {number}?", assistant=CLASSES[number % 3])
        samples.append(Sample(id=f"val-{number}", source="toy", conversations=(turn,)))
    write_samples(folder / "val.jsonl", samples)
    write_shards([folder / "val.jsonl"], folder / "shards", num_workers=1)
    return folder / "shards"


def predictions(count: int, wrong: Sequence[int] = ()) -> list[Prediction]:
    """Answers to `make_eval_shards`, some of them wrong."""
    found: list[Prediction] = []
    for number in range(count):
        answer = CLASSES[number % 3]
        said = "something <b>else</b>" if number in wrong else answer
        is_right = said == answer
        found.append(
            Prediction(f"val-{number}", "toy", said, answer, (), is_right, float(is_right))
        )
    return found


def log_line(step: int, **values: Any) -> dict[str, Any]:
    """A line of a run of 100 steps."""
    return {
        "step": step,
        "num_steps": 100,
        "epoch": step / 50,
        "loss": 1 + 10 / step,
        "learning_rate": 1e-4,
        "grad_norm": 1.0,
        "label_tokens": 64,
        "tokens_per_second": 41_000.0,
        "images_per_second": 14.0,
        "data_wait": 0.02,
        "memory_gib": 36.2,
        "mfu": 0.46,
        "eta_seconds": 1.0,
        "seconds": step * 1.5,
        **values,
    }


def write_run(
    folder: Path,
    *,
    shards: Path | None = None,
    lines: Sequence[dict[str, Any]] = (),
    history: Sequence[dict[str, Any]] = (),
    evaluations: dict[str, list[Prediction]] | None = None,
    attempts: Sequence[dict[str, Any]] = (),
) -> Path:
    """Write the files of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"train": "shards/train", "eval": None if shards is None else str(shards)}
    config = {"model": "models/tiny", "data": data, "method": {"name": "lora"}}
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "eval").mkdir(exist_ok=True)
    (folder / "eval" / "history.jsonl").write_text(
        "".join(json.dumps(point) + "\n" for point in history)
    )
    if attempts:
        (folder / "env.json").write_text(json.dumps({"attempts": list(attempts)}))
    for name, answers in (evaluations or {}).items():
        (folder / "eval" / name).mkdir()
        write_predictions(answers, folder / "eval" / name / "predictions.jsonl")
        score = sum(bool(p.correct) for p in answers) / len(answers)
        summary = {"metric": "accuracy", "score": score, "accuracy": score}
        (folder / "eval" / name / "eval.json").write_text(json.dumps(summary))
    return folder
