"""A run's folder, read back: what anyone can look at afterwards.

    runs/first/
        config.yaml                   every setting, defaults included
        env.json                      where each attempt ran (`env_report`)
        log.jsonl                     a line per interval (`runlog.Line`)
        logs/rank-N.jsonl             of several processes, what each did
        tensorboard/                  the same for TensorBoard
        checkpoints/                  to go on from (`checkpoint`)
        eval/history.jsonl            what was measured on the way (`eval_history`)
        eval/{before,after,step-N}/   predictions.jsonl and eval.json
        model/ or adapter/            the result
        report.html                   all of it to look at (`report`)

    run = read_run("runs/first")
    run.lines[-1]["loss"], run.evaluations[-1].summary["accuracy"]

Reading is forgiving where a run is still going on or was killed: a file that is not there yet is
empty, a last line that is cut off is left out.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from phi3v_train.env_report import read_attempts
from phi3v_train.eval_history import HISTORY
from phi3v_train.predictions import Prediction, read_predictions


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The answers of one evaluation."""

    name: str
    """`before`, `step-00000020` or `after`."""

    summary: dict[str, Any]
    """What `eval.json` holds."""

    predictions: tuple[Prediction, ...]

    @property
    def step(self) -> int | None:
        """Steps done when it was made; None of `after`, which is the last."""
        if self.name == "before":
            return 0
        number = self.name.removeprefix("step-")
        return int(number) if number.isdigit() else None


@dataclass(frozen=True, slots=True)
class Run:
    """All that a run left for people to read."""

    folder: Path
    config: dict[str, Any]
    """As in `config.yaml`."""

    config_text: str
    attempts: tuple[dict[str, Any], ...]
    """Of `env.json`, the first first."""

    lines: tuple[dict[str, Any], ...]
    """Of `log.jsonl`, by step."""

    history: tuple[dict[str, Any], ...]
    """Of `eval/history.jsonl`, by step."""

    evaluations: tuple[Evaluation, ...]
    """Those with answers, the first first."""

    @property
    def num_steps(self) -> int | None:
        """Of the whole run; None before the first line."""
        return self.lines[-1]["num_steps"] if self.lines else None

    @property
    def step(self) -> int:
        """Of the last line."""
        return self.lines[-1]["step"] if self.lines else 0


def read_run(folder: str | Path) -> Run:
    """Read a run's folder.

    Raises:
        ValueError: it is none, or a file in it was changed into something else.
    """
    folder = Path(folder)
    config_file = folder / "config.yaml"
    if not config_file.is_file():
        raise ValueError(
            f"{folder} is not the folder of a run: it has no config.yaml; name the output_dir of "
            "`phi3v-train launch`"
        )
    text = config_file.read_text(encoding="utf-8")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(
            f"{config_file} is not valid YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(config, dict):
        raise ValueError(f"{config_file} is not the configuration of a run")
    found = [
        _read_evaluation(path.parent) for path in (folder / "eval").glob("*/predictions.jsonl")
    ]
    return Run(
        folder=folder,
        config=config,
        config_text=text,
        attempts=tuple(read_attempts(folder / "env.json")),
        lines=tuple(read_lines(folder / "log.jsonl")),
        history=tuple(read_lines(folder / HISTORY)),
        evaluations=tuple(sorted(found, key=lambda e: (e.step is None, e.step or 0, e.name))),
    )


def _read_evaluation(folder: Path) -> Evaluation:
    try:
        summary = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        summary = {}
    except ValueError as error:
        raise ValueError(f"{folder / 'eval.json'} is not JSON: {error}") from None
    return Evaluation(folder.name, summary, tuple(read_predictions(folder / "predictions.jsonl")))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file with `step` in each; none where there is no file.

    Raises:
        ValueError: a line that is none, unless it is the last one: a kill may have cut it off.
    """
    if not path.is_file():
        return []
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found: list[dict[str, Any]] = []
    for number, text in enumerate(texts, start=1):
        try:
            fields = json.loads(text)
            fields["step"] = int(fields["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(texts):
                break
            raise ValueError(f"{path}:{number}: not a line of a log: {error}") from None
        found.append(fields)
    return found
