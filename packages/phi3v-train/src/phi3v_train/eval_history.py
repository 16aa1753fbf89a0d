"""Evaluations made during a run, the best of them, and when to stop waiting for a better one.

    eval/history.jsonl

    {"step": 100, "loss": 0.81}
    {"step": 200, "loss": 0.74, "accuracy": 0.62}

`best` and stopping are functions of these lines alone, so a run that goes on knows what it knew:
lines beyond the step it goes on from are removed.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from phi3v_data.atomic import write_atomic

from phi3v_train.config import EvalConfig

HISTORY = Path("eval") / "history.jsonl"
"""Below the run's folder."""


@dataclass(frozen=True, slots=True)
class EvalPoint:
    """What was measured after so many steps."""

    step: int
    """Steps done."""
    values: dict[str, float]
    """`loss` (per label token), `accuracy`, `anls`: what was measured."""

    def to_json(self) -> str:
        """One line of the file, without its line break."""
        return json.dumps({"step": self.step, **self.values})


@dataclass(frozen=True, slots=True)
class Aim:
    """The value that decides what is best."""

    name: str
    """`loss`, `accuracy` or `anls`."""
    is_higher_better: bool

    @classmethod
    def of(cls, config: EvalConfig) -> "Aim":
        """As the configuration says."""
        if config.best_by == "loss":
            return cls("loss", is_higher_better=False)
        return cls(config.metric, is_higher_better=True)

    def is_better(self, value: float, than: float) -> bool:
        """Strictly."""
        return value > than if self.is_higher_better else value < than


def best_point(points: Sequence[EvalPoint], aim: Aim) -> EvalPoint | None:
    """The best one that measured what is aimed at, the first of equals; None where none did."""
    best: EvalPoint | None = None
    for point in points:
        value = point.values.get(aim.name)
        if value is None or math.isnan(value):  # nothing compares with NaN
            continue
        if best is None or aim.is_better(value, best.values[aim.name]):
            best = point
    return best


def num_since_best(points: Sequence[EvalPoint], aim: Aim) -> int:
    """Evaluations of what is aimed at since the best one."""
    best = best_point(points, aim)
    if best is None:
        return 0
    return sum(point.step > best.step and aim.name in point.values for point in points)


def is_out_of_patience(points: Sequence[EvalPoint], aim: Aim, patience: int | None) -> bool:
    """Whether the last `patience` evaluations brought nothing better."""
    return patience is not None and num_since_best(points, aim) >= patience


def joined(points: Sequence[EvalPoint], step: int, values: dict[str, float]) -> list[EvalPoint]:
    """The points with what was measured after `step`, which may join an earlier measurement."""
    if points and points[-1].step == step:
        return [*points[:-1], replace(points[-1], values={**points[-1].values, **values})]
    return [*points, EvalPoint(step, values)]


def read_history(output_dir: Path, up_to: int) -> list[EvalPoint]:
    """The points of a run up to a step.

    Raises:
        ValueError: the file was changed by hand into something else.
    """
    path = output_dir / HISTORY
    if not path.is_file():
        return []
    points: list[EvalPoint] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            values = json.loads(line)
            step = int(values.pop("step"))
            points.append(EvalPoint(step, {name: float(value) for name, value in values.items()}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}:{number}: not an evaluation: {error}") from None
    return [point for point in points if point.step <= up_to]


def write_history(output_dir: Path, points: Sequence[EvalPoint]) -> None:
    """Write all points, whole or not at all."""
    write_atomic(output_dir / HISTORY, "".join(f"{point.to_json()}\n" for point in points))
