"""Questions in, answers and a score out: greedy generation over a shard directory.

result = evaluate_model("runs/first/model", "shards/val", out_dir="runs/first/eval")
print(result)            # accuracy 0.917 (55 of 60)

runs/first/eval/predictions.jsonl     {"id": ..., "prediction": ..., "answer": ..., "correct": ...}
runs/first/eval/eval.json             the metric, counts by class
runs/first/eval/confusion.json, .txt  of a classification: which class was taken for which
runs/first/eval/rrc_submission.json   of DocVQA: to upload

Of a conversation every question is asked, after the turns before it as the data has them; see
`questions`.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from phi3v_data.atomic import write_atomic
from phi3v_data.schema import Sample
from phi3v_data.shards import ShardReader, open_shards
from torch import Tensor

from phi3v_train.answering_model import NUM_CROPS, find_answering_model
from phi3v_train.chat import ChatEncoder
from phi3v_train.collator import EncodedSample, SampleEncoder
from phi3v_train.confusion import confusion_json, confusion_table, is_classification
from phi3v_train.engine import World, join_world
from phi3v_train.hd_transform import hd_layout
from phi3v_train.methods import load_for_inference
from phi3v_train.metrics import (
    AnlsVariant,
    ClassCount,
    Metric,
    count_by_class,
    is_correct,
    scorer,
)
from phi3v_train.modeling_phi3_v import Phi3VForCausalLM
from phi3v_train.predictions import Prediction, write_predictions
from phi3v_train.questions import Question, asked, list_questions
from phi3v_train.rrc import is_docvqa, write_rrc_submission

BATCH_SIZE = 8
"""Questions answered together, unless said otherwise."""


@dataclass(frozen=True, slots=True)
class EvalResult:
    """All predictions of a data set, in its order, and what they amount to."""

    predictions: tuple[Prediction, ...]
    metric: Metric
    score: float | None
    """The metric, 0 to 1; None where the data has no answers to compare with."""
    accuracy: float | None
    """Share that equals an accepted answer, whatever the metric; None as above."""
    by_class: dict[str, ClassCount] | None
    """By the data's answer, where answers are classes; else None."""

    def __str__(self) -> str:
        count = len(self.predictions)
        if self.score is None:
            return f"{count:,} answers; the data has none to compare them with"
        right = sum(bool(p.correct) for p in self.predictions)
        if self.metric == "accuracy":
            return f"accuracy {self.score:.3f} ({right} of {count})"
        return f"ANLS {self.score:.4f} ({count} answers, {right} of them exact)"

    def summary(self) -> dict[str, Any]:
        """What `eval.json` holds."""
        summary: dict[str, Any] = {
            "metric": self.metric,
            "num_samples": len({p.id for p in self.predictions}),
            "num_questions": len(self.predictions),
        }
        if self.score is None:
            return {**summary, "score": None}
        summary |= {
            "score": self.score,
            self.metric: self.score,
            "accuracy": self.accuracy,
            "num_correct": sum(bool(p.correct) for p in self.predictions),
        }
        if self.by_class is not None:
            summary["by_class"] = {label: asdict(c) for label, c in self.by_class.items()}
        return summary


@torch.inference_mode()
def generate_answers(
    model: Phi3VForCausalLM,
    encoder: SampleEncoder,
    samples: Sequence[EncodedSample],
    *,
    max_new_tokens: int,
) -> list[str]:
    """Answer a batch of prompts greedily, with a key and value cache.

    Args:
        model: in evaluation mode.
        encoder: that made `samples`.
        samples: encoded `for_generation`.
        max_new_tokens: longest answer.

    Returns:
        One text per sample, up to its `<|end|>`.
    """
    ids = encoder.chat.ids
    longest = max(len(sample.input_ids) for sample in samples)
    input_ids = torch.full((len(samples), longest), ids.end_of_text)
    mask = torch.zeros_like(input_ids)
    for row, sample in enumerate(samples):  # padding goes in front: answers continue the prompts
        input_ids[row, longest - len(sample.input_ids) :] = torch.from_numpy(sample.input_ids)
        mask[row, longest - len(sample.input_ids) :] = 1
    device = model.device
    images: dict[str, Tensor] = {}
    if any(len(sample.crops) for sample in samples):
        images["pixel_values"] = torch.cat([torch.from_numpy(s.crops) for s in samples]).to(device)
        images["crop_grid"] = torch.cat([torch.from_numpy(s.crop_grid) for s in samples])
    output = model.generate(  # pyright: ignore[reportAttributeAccessIssue]: its self type fits no model
        input_ids=input_ids.to(device),
        attention_mask=mask.to(device),
        **images,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=[ids.end, ids.end_of_text],
        pad_token_id=ids.end_of_text,
    )
    return [encoder.chat.decode(row) for row in output[:, longest:].tolist()]


def evaluate(
    model: Phi3VForCausalLM,
    encoder: SampleEncoder,
    reader: ShardReader,
    *,
    questions: Sequence[Question],
    max_new_tokens: int,
    batch_size: int = BATCH_SIZE,
    metric: Metric = "accuracy",
    anls: AnlsVariant = "official",
    autocast_dtype: torch.dtype | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[Prediction]:
    """Answer some questions of a shard directory, in this process.

    Args:
        model: any mode; it is put into evaluation mode and back.
        encoder: of its tokenizer, with the crop count it was trained with.
        reader: the data.
        questions: which ones; of `list_questions`.
        max_new_tokens: longest answer.
        batch_size: questions answered together: those of like length.
        metric: what `score` is.
        anls: its variant, where it is ANLS.
        autocast_dtype: dtype of matrix products over float32 weights; None: the weights' own.
        on_progress: called with the number of questions done.

    Returns:
        Predictions in the order of `questions`.

    Raises:
        ValueError: a sample that cannot be read or encoded; the message names it.
    """
    score = scorer(metric, anls)
    # Long and short prompts apart; the longest first, so that memory runs out at once or never.
    by_length = _longest_first(reader, encoder, questions)
    found: dict[Question, Prediction] = {}
    was_training = model.training
    model.eval()
    try:
        for batch in _batches(by_length, batch_size):
            samples: list[Sample] = []
            encoded: list[EncodedSample] = []
            for number, turn in batch:
                record = reader[number]
                sample = asked(record.sample, turn)
                images = record.images[: len(sample.images)]
                samples.append(sample)
                encoded.append(encoder(sample, images, for_generation=True))
            with _autocast(model.device, autocast_dtype):
                texts = generate_answers(model, encoder, encoded, max_new_tokens=max_new_tokens)
            for question, sample, text in zip(batch, samples, texts, strict=True):
                turn = sample.conversations[-1]
                accepted = turn.answers or (() if turn.assistant is None else (turn.assistant,))
                found[question] = Prediction(
                    id=sample.id,
                    source=sample.source,
                    prediction=text,
                    answer=turn.assistant,
                    answers=accepted,
                    correct=is_correct(text, accepted) if accepted else None,
                    score=score(text, accepted) if accepted else None,
                    turn=question.turn + 1,
                )
            if on_progress is not None:
                on_progress(len(found))
    finally:
        model.train(was_training)
    return [found[question] for question in questions]


def evaluate_on_all_ranks(
    model: Phi3VForCausalLM,
    encoder: SampleEncoder,
    reader: ShardReader,
    world: World,
    *,
    count: int,
    on_progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> list[Prediction]:
    """Answer what the first `count` samples ask: each rank a share of about the same length.

    Args:
        model: the same weights on every rank, whole.
        encoder: as in `evaluate`.
        reader: as in `evaluate`.
        world: the ranks.
        count: how many samples, from the first.
        on_progress: called with (questions done, questions in all) of this rank.
        settings: of `evaluate`.

    Returns:
        Every question's prediction once, in the order of the data, on every rank.

    Raises:
        ValueError: as `evaluate`.
    """
    questions = list_questions(reader, count)
    own = _longest_first(reader, encoder, questions)[world.rank :: world.world_size]
    predictions = evaluate(
        model,
        encoder,
        reader,
        questions=own,
        on_progress=None if on_progress is None else lambda done: on_progress(done, len(own)),
        **settings,
    )
    shares = world.gather(list(zip(own, predictions, strict=True)))
    merged = dict(pair for share in shares for pair in share)
    assert len(merged) == sum(map(len, shares)) == len(questions)
    return [merged[question] for question in questions]


def _longest_first(
    reader: ShardReader, encoder: SampleEncoder, questions: Sequence[Question]
) -> list[Question]:
    """The questions by the length of their prompts; those of one length in their order."""
    lengths = prompt_lengths(reader, encoder, questions)
    return [questions[i] for i in sorted(range(len(questions)), key=lambda i: -lengths[i])]


def prompt_lengths(
    reader: ShardReader, encoder: SampleEncoder, questions: Sequence[Question]
) -> list[int]:
    """Tokens of each prompt, from the index: no image is read.

    Raises:
        ValueError: a sample that cannot be encoded; the message names it.
    """
    lengths: list[int] = []
    for number, turn in questions:
        sample = asked(reader.sample(number), turn)
        sizes_wh = reader.image_sizes_wh(number)[: len(sample.images)]
        num_text = encoder.chat.encode_text(sample, for_generation=True).num_tokens
        layouts = [hd_layout(*size_wh, encoder.num_crops) for size_wh in sizes_wh]
        lengths.append(num_text + sum(layout.num_tokens for layout in layouts))
    return lengths


def summarize(predictions: Sequence[Prediction], metric: Metric = "accuracy") -> EvalResult:
    """Score predictions that were made with this metric.

    Raises:
        ValueError: there are none, or only some can be compared with an answer.
    """
    if not predictions:
        raise ValueError("no samples to evaluate")
    scores = [p.score for p in predictions if p.score is not None]
    if not scores:
        return EvalResult(tuple(predictions), metric, None, None, None)
    if len(scores) < len(predictions):
        missing = next(p.id for p in predictions if p.score is None)
        raise ValueError(
            f"sample {missing!r} has no answer to compare with, and {len(scores)} of "
            f"{len(predictions)} samples have one; evaluate splits with and without answers apart"
        )
    by_class = count_by_class(
        [p.prediction for p in predictions], [str(p.answer) for p in predictions]
    )
    right = sum(bool(p.correct) for p in predictions)
    return EvalResult(
        tuple(predictions),
        metric,
        score=sum(scores) / len(scores),
        # Of several accepted answers any counts, so this is not `metrics.accuracy` of the first.
        accuracy=right / len(predictions),
        by_class=by_class if is_classification(by_class) else None,
    )


def write_result(result: EvalResult, out_dir: Path, name: str = "eval.json") -> None:
    """Write what the docstring above lists into a folder, the summary under `name`, last."""
    write_predictions(result.predictions, out_dir / "predictions.jsonl")
    if result.by_class is not None:
        write_atomic(out_dir / "confusion.json", confusion_json(result.by_class))
        write_atomic(out_dir / "confusion.txt", confusion_table(result.by_class))
    if is_docvqa(result.predictions):
        write_rrc_submission(result.predictions, out_dir / "rrc_submission.json")
    write_atomic(out_dir / name, json.dumps(result.summary(), indent=2, ensure_ascii=False) + "\n")


def evaluate_model(
    model: str | Path,
    data: str | Path,
    *,
    adapter: str | Path | None = None,
    out_dir: str | Path | None = None,
    num_crops: int | None = None,
    max_new_tokens: int = 64,
    batch_size: int = BATCH_SIZE,
    metric: Metric = "accuracy",
    anls: AnlsVariant = "official",
    limit: int | None = None,
    device: str = "auto",
    on_progress: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """Evaluate a model folder, with or without adapters, on a shard directory.

    Under torchrun every process answers its share, and the first one writes.

    Args:
        model: Hugging Face folder; or a run or an adapter, see `find_answering_model`.
        data: shard directory; without answers there are predictions and no score.
        adapter: PEFT folder (or a run) to put on the model.
        out_dir: where predictions and summary go, if anywhere.
        num_crops: as in training; None: what the run says that it was, else 16.
        max_new_tokens: longest answer.
        batch_size: questions answered together.
        metric: `accuracy` or `anls`.
        anls: `official` or `recipe`; see `metrics.anls_of_one`.
        limit: only the first so many samples.
        device: `auto`, `cpu` or `cuda`.
        on_progress: called with (questions done, questions in all) of this process.

    Raises:
        ValueError: a folder that is not what it should be.
    """
    world = join_world(device)
    try:
        reader = open_shards(data)
        found = find_answering_model(model, adapter)
        num_crops = num_crops or found.num_crops or NUM_CROPS
        encoder = SampleEncoder(ChatEncoder(found.folder), num_crops)
        loaded = load_for_inference(found.folder, adapter=found.adapter, device=world.device)
        predictions = evaluate_on_all_ranks(
            loaded,
            encoder,
            reader,
            world,
            count=len(reader) if limit is None else min(limit, len(reader)),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            metric=metric,
            anls=anls,
            on_progress=on_progress,
        )
        result = summarize(predictions, metric)
        if out_dir is not None and world.is_main:
            write_result(result, Path(out_dir))
        world.barrier()
        return result
    finally:
        world.leave()


def _autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def _batches(questions: Sequence[Question], size: int) -> Iterator[Sequence[Question]]:
    return (questions[start : start + size] for start in range(0, len(questions), size))
