"""Questions in, answers and a score out: greedy generation over a shard directory.

result = evaluate_model("runs/first/model", "shards/val", out_dir="runs/first/eval")
print(result)            # accuracy 0.917 (55 of 60)

runs/first/eval/predictions.jsonl   {"id": ..., "prediction": ..., "answer": ..., "correct": ...}
runs/first/eval/eval.json           accuracy, counts by class
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from phi3v_data.atomic import write_atomic
from phi3v_data.shards import ShardReader, open_shards
from torch import Tensor

from phi3v_train.chat import ChatEncoder
from phi3v_train.collator import EncodedSample, SampleEncoder
from phi3v_train.metrics import ClassCount, count_by_class, normalize_answer
from phi3v_train.modeling_phi3_v import Phi3VForCausalLM

BATCH_SIZE = 8
"""Samples generated together. They are sorted by length first, so little of a batch is padding."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """One answered question."""

    id: str
    prediction: str
    """What the model said, special tokens left out."""
    answer: str
    """What the data says."""
    correct: bool
    """Equal after `normalize_answer`."""


@dataclass(frozen=True, slots=True)
class EvalResult:
    """All predictions of a data set, in its order, and what they amount to."""

    predictions: tuple[Prediction, ...]
    accuracy: float
    by_class: dict[str, ClassCount]

    def __str__(self) -> str:
        right = sum(p.correct for p in self.predictions)
        return f"accuracy {self.accuracy:.3f} ({right} of {len(self.predictions)})"

    def summary(self) -> dict[str, Any]:
        """What `eval.json` holds."""
        return {
            "accuracy": self.accuracy,
            "num_samples": len(self.predictions),
            "num_correct": sum(p.correct for p in self.predictions),
            "by_class": {label: asdict(count) for label, count in self.by_class.items()},
        }


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
    numbers: Sequence[int],
    max_new_tokens: int,
    on_progress: Callable[[int], None] | None = None,
) -> list[Prediction]:
    """Answer some samples of a shard directory.

    Args:
        model: any mode; it is put into evaluation mode and back.
        encoder: of its tokenizer, with the crop count it was trained with.
        reader: the data.
        numbers: which samples.
        max_new_tokens: longest answer.
        on_progress: called with the number of samples done.

    Returns:
        Predictions in the order of `numbers`.

    Raises:
        ValueError: a sample without an answer to compare with.
    """
    was_training = model.training
    model.eval()
    found: dict[int, Prediction] = {}
    # Long and short prompts apart; the longest first, so that memory runs out at once or never.
    by_length = sorted(numbers, key=lambda n: (-sum(_pixels(reader, n)), n))
    try:
        for batch in _batches(by_length, BATCH_SIZE):
            records = [reader[number] for number in batch]
            encoded = [encoder(r.sample, r.images, for_generation=True) for r in records]
            texts = generate_answers(model, encoder, encoded, max_new_tokens=max_new_tokens)
            for number, record, text in zip(batch, records, texts, strict=True):
                turn = record.sample.conversations[-1]
                if turn.assistant is None:
                    raise ValueError(
                        f"sample {record.sample.id!r} has no answer to compare with; evaluate on "
                        "a split that has answers"
                    )
                accepted = {normalize_answer(a) for a in (turn.answers or (turn.assistant,))}
                found[number] = Prediction(
                    id=record.sample.id,
                    prediction=text,
                    answer=turn.assistant,
                    correct=normalize_answer(text) in accepted,
                )
            if on_progress is not None:
                on_progress(len(found))
    finally:
        model.train(was_training)
    return [found[number] for number in numbers]


def summarize(predictions: Sequence[Prediction]) -> EvalResult:
    """Score predictions.

    Raises:
        ValueError: there are none.
    """
    by_class = count_by_class([p.prediction for p in predictions], [p.answer for p in predictions])
    # Of several accepted answers any counts, so this is not `metrics.accuracy` of the first.
    right = sum(p.correct for p in predictions)
    return EvalResult(tuple(predictions), right / len(predictions), by_class)


def write_result(result: EvalResult, out_dir: Path, name: str = "eval.json") -> None:
    """Write `predictions.jsonl` and the summary under `name` into a folder."""
    lines = [json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in result.predictions]
    write_atomic(out_dir / "predictions.jsonl", "".join(lines))
    write_atomic(out_dir / name, json.dumps(result.summary(), indent=2, ensure_ascii=False) + "\n")


def evaluate_model(
    model: str | Path,
    data: str | Path,
    *,
    adapter: str | Path | None = None,
    out_dir: str | Path | None = None,
    num_crops: int = 16,
    max_new_tokens: int = 64,
    limit: int | None = None,
    device: str = "auto",
    on_progress: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """Evaluate a model folder, with or without adapters, on a shard directory.

    Args:
        model: Hugging Face folder.
        data: shard directory with answers.
        adapter: PEFT folder to put on the model.
        out_dir: where `predictions.jsonl` and `eval.json` go, if anywhere.
        num_crops: as in training.
        max_new_tokens: longest answer.
        limit: only the first so many samples.
        device: `auto`, `cpu` or `cuda`.
        on_progress: called with (samples done, samples in all).

    Raises:
        ValueError: a folder that is not what it should be.
    """
    from phi3v_train.methods import load_for_inference

    reader = open_shards(data)
    encoder = SampleEncoder(ChatEncoder(model), num_crops)
    loaded = load_for_inference(model, adapter=adapter, device=device)
    count = len(reader) if limit is None else min(limit, len(reader))
    predictions = evaluate(
        loaded,
        encoder,
        reader,
        numbers=range(count),
        max_new_tokens=max_new_tokens,
        on_progress=None if on_progress is None else lambda done: on_progress(done, count),
    )
    result = summarize(predictions)
    if out_dir is not None:
        write_result(result, Path(out_dir))
    return result


def _pixels(reader: ShardReader, number: int) -> Iterator[int]:
    return (width * height for width, height in reader.image_sizes_wh(number))


def _batches(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (numbers[start : start + size] for start in range(0, len(numbers), size))
