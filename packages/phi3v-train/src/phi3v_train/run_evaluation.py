"""The evaluations of a training run: when they are due, what they measure, what they leave.

    evaluation = open_run_evaluation(config, world, stream.encoder, stream.settings)
    evaluation.recall(start)                         # what an earlier attempt measured
    evaluation.answer(model, "before")               # eval_before.json, eval/before/
    point = evaluation.after_step(200, num_steps, engine.loss_sum, engine.whole)
    evaluation.describe(point)                       # loss 0.7412, accuracy 0.620 (best so far)
    evaluation.is_out_of_patience                    # the run may end

    eval/history.jsonl              every measurement; see `eval_history`
    eval/step-00000200/             the answers after step 200, as `evaluate` writes them

All ranks call it at the same steps, since all take part.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from phi3v_data.atomic import write_atomic
from phi3v_data.shards import ShardReader, open_shards

from phi3v_train.collator import SampleEncoder
from phi3v_train.config import TrainConfig
from phi3v_train.engine import World
from phi3v_train.eval_history import (
    Aim,
    EvalPoint,
    best_point,
    is_out_of_patience,
    joined,
    read_history,
    write_history,
)
from phi3v_train.eval_loss import LossSum, evaluate_loss, open_eval_rows
from phi3v_train.evaluate import EvalResult, evaluate_on_all_ranks, summarize, write_result
from phi3v_train.methods import TrainingModel
from phi3v_train.modeling_phi3_v import Phi3VForCausalLM
from phi3v_train.retention import Score
from phi3v_train.stream import StreamSettings, TrainStream

Progress = Callable[[int, int], None]
"""Called with (questions done, questions in all) of this rank."""


@dataclass(slots=True)
class RunEvaluation:
    """What a run knows of its evaluations; made by `open_run_evaluation`."""

    config: TrainConfig
    world: World
    encoder: SampleEncoder
    reader: ShardReader
    rows: TrainStream | None
    """Of the loss; None where it is never measured."""
    points: list[EvalPoint] = field(default_factory=list[EvalPoint])
    """All measurements so far, by step."""

    @property
    def aim(self) -> Aim:
        """The value that decides what is best."""
        return Aim.of(self.config.eval)

    @property
    def best(self) -> EvalPoint | None:
        """The best measurement so far of what is aimed at."""
        return best_point(self.points, self.aim)

    @property
    def is_out_of_patience(self) -> bool:
        """Whether the last `eval.patience` measurements brought nothing better."""
        return is_out_of_patience(self.points, self.aim, self.config.eval.patience)

    @property
    def why_it_is_over(self) -> str:
        """Where `is_out_of_patience`: a reason to print."""
        best = self.best
        assert best is not None
        return (
            f"no better {self.aim.name} than {best.values[self.aim.name]:.4f} of step {best.step} "
            f"in {self.config.eval.patience} evaluations (eval.patience)"
        )

    def score_at(self, step: int) -> Score | None:
        """What a checkpoint of this step is ranked by; None where it was not measured."""
        if not self.is_known(step) or self.aim.name not in self.points[-1].values:
            return None
        value = self.points[-1].values[self.aim.name]
        return Score(self.aim.name, value, higher_is_better=self.aim.is_higher_better)

    def is_best(self, step: int) -> bool:
        """Whether this step was measured and is the best so far."""
        return self.best is not None and self.best.step == step

    def recall(self, start: int) -> None:
        """Take over what an earlier attempt measured up to step `start`.

        Raises:
            ValueError: `eval/history.jsonl` was changed into something else.
        """
        self.points = read_history(self.config.output_dir, start)

    def is_known(self, step: int) -> bool:
        """Whether something was measured after this step."""
        return bool(self.points) and self.points[-1].step == step

    def is_due(self, done: int, num_steps: int) -> bool:
        """Whether anything is measured after this step."""
        return self._loss_is_due(done, num_steps) or self._answers_are_due(done)

    def after_step(
        self,
        done: int,
        num_steps: int,
        loss_sum: LossSum,
        whole: Callable[[], TrainingModel],
        on_progress: Progress | None = None,
    ) -> EvalPoint:
        """Measure what is due after `done` of `num_steps` steps.

        Args:
            done: steps done.
            num_steps: of the whole run; after the last the loss is measured once more.
            loss_sum: forward pass of the training model, which is in evaluation mode.
            whole: gives the model with whole weights, to generate with.
            on_progress: of the answers.

        Raises:
            ValueError: a sample that cannot be read or encoded; the message names it.
        """
        values: dict[str, float] = {}
        if self._loss_is_due(done, num_steps):
            assert self.rows is not None
            values["loss"] = evaluate_loss(self.rows, loss_sum, self.world)
        if self._answers_are_due(done):
            training = whole()
            result = self._answers(training.model, training.autocast_dtype, on_progress)
            assert result.score is not None
            values[result.metric] = result.score
            if self.world.is_main:
                write_result(result, step_folder(self.config.output_dir, done))
        assert values, "nothing was due"
        self.points = joined(self.points, done, values)
        if self.world.is_main:
            write_history(self.config.output_dir, self.points)
        return self.points[-1]

    def answer(
        self,
        model: Phi3VForCausalLM,
        when: str,
        autocast_dtype: torch.dtype | None = None,
        on_progress: Progress | None = None,
    ) -> EvalResult:
        """Answer all questions `before` or `after` the run, and write the result.

        Args:
            model: with whole weights.
            when: `before` or `after`.
            autocast_dtype: dtype of matrix products over float32 weights; None: the weights' own.
            on_progress: of the answers.

        Raises:
            ValueError: as `after_step`.
        """
        result = self._answers(model, autocast_dtype, on_progress)
        if self.world.is_main:
            folder = self.config.output_dir / "eval" / when
            write_result(result, folder)
            text = (folder / "eval.json").read_text(encoding="utf-8")
            write_atomic(self.config.output_dir / f"eval_{when}.json", text)
        return result

    def describe(self, point: EvalPoint) -> str:
        """A measurement in words."""
        values = ", ".join(f"{name} {value:.4f}" for name, value in point.values.items())
        if self.aim.name not in point.values:
            return f"evaluated after step {point.step}: {values}"
        best = self.best
        assert best is not None
        if best.step == point.step:
            return f"evaluated after step {point.step}: {values} (best so far)"
        value = best.values[self.aim.name]
        return f"evaluated after step {point.step}: {values} (best {value:.4f} at step {best.step})"

    def _answers(
        self, model: Phi3VForCausalLM, dtype: torch.dtype | None, on_progress: Progress | None
    ) -> EvalResult:
        settings = self.config.eval
        predictions = evaluate_on_all_ranks(
            model,
            self.encoder,
            self.reader,
            self.world,
            count=_count(self.config, self.reader),
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            metric=settings.metric,
            anls=settings.anls,
            autocast_dtype=dtype,
            on_progress=on_progress,
        )
        return summarize(predictions, settings.metric)

    def _loss_is_due(self, done: int, num_steps: int) -> bool:
        every = self.config.eval.every_steps
        return every is not None and (done % every == 0 or done == num_steps)

    def _answers_are_due(self, done: int) -> bool:
        every = self.config.eval.generate_every_steps
        return every is not None and done % every == 0


def open_run_evaluation(
    config: TrainConfig,
    world: World,
    encoder: SampleEncoder,
    settings: StreamSettings,
    on_progress: Progress | None = None,
) -> RunEvaluation:
    """Open `data.eval` for a run, before its first step: what can't be evaluated stops it here.

    Args:
        config: `data.eval` is set.
        world: the ranks.
        encoder: of the training stream.
        settings: of the training stream.
        on_progress: called with the number of samples measured so far, and that of all.

    Raises:
        ValueError: not shards, or a sample without an answer; the message names it.
    """
    assert config.data.eval is not None
    reader = open_shards(config.data.eval)
    for number in range(_count(config, reader)):
        sample = reader.sample(number)
        if sample.conversations[-1].assistant is None:
            raise ValueError(
                f"data.eval: sample {sample.id!r} of {config.data.eval} has no answer to compare "
                "with; name a split that has answers, and answer this one with `phi3v-train eval`"
            )
    rows = None
    if config.eval.every_steps is not None:
        rows = open_eval_rows(
            config.data.eval, encoder, settings, limit=config.eval.limit, on_progress=on_progress
        )
    return RunEvaluation(config, world, encoder, reader, rows)


def step_folder(output_dir: Path, step: int) -> Path:
    """Where the answers after a step are."""
    return output_dir / "eval" / f"step-{step:08d}"


def _count(config: TrainConfig, reader: ShardReader) -> int:
    return min(len(reader), config.eval.limit or len(reader))
