"""Some answers of an evaluation with the pictures that were asked about.

    items, note = choose_answers(evaluation, shards="shards/val", before=run.evaluations[0])
    items[0].question, items[0].pictures, items[0].prediction.correct

As many wrong ones as right ones where there are both, evenly spread over the data, in its order.
Pictures are drawn small from the shards that were evaluated; where those are gone, or hold other
samples now, the texts are shown alone and the note says why.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phi3v_data.shards import ShardReader, open_shards
from phi3v_data.thumbnails import Thumbnail, draw, plan_thumbnails, spread

from phi3v_train.predictions import Prediction
from phi3v_train.questions import asked
from phi3v_train.run_folder import Evaluation

MOST_ANSWERS = 48
MOST_PICTURES = 8
"""Of one answer; evenly spread over its images."""

MOST_BYTES = 6_000_000
"""Of all pictures together."""

LONGEST_EDGE_PX = 512


@dataclass(frozen=True, slots=True)
class GalleryItem:
    """One answered question."""

    prediction: Prediction
    question: str
    """What the user said; empty where the shards are gone."""

    pictures: tuple[Thumbnail, ...]
    num_images: int
    """Up to the question: there may be more than pictures."""

    before: str | None
    """What was answered before training; None where nobody asked."""


def choose_answers(
    evaluation: Evaluation, shards: str | Path | None, before: Evaluation | None = None
) -> tuple[list[GalleryItem], str]:
    """Choose answers to show, and draw their pictures.

    Args:
        evaluation: the answers.
        shards: that were evaluated; None: not known.
        before: an earlier evaluation of the same samples.

    Returns:
        The items, and why there are no pictures: empty where there are.
    """
    numbers = _choose(evaluation.predictions)
    answered = before.predictions if before is not None else ()
    earlier = {(p.id, p.turn): p.prediction for p in answered}
    predictions = [evaluation.predictions[number] for number in numbers]
    texts = [GalleryItem(p, "", (), 0, earlier.get((p.id, p.turn))) for p in predictions]
    if shards is None:
        return texts, "config.yaml names no data.eval"
    try:
        reader = open_shards(shards)
        rows = _find_rows(reader, evaluation.predictions, numbers)
        samples = [
            asked(reader.sample(row), item.prediction.turn - 1)
            for row, item in zip(rows, texts, strict=True)
        ]
        drawn = _draw(reader, rows, [len(sample.images) for sample in samples])
    except (ValueError, OSError) as error:
        return texts, f"data.eval cannot be read: {error}"
    items: list[GalleryItem] = []
    for item, sample, pictures in zip(texts, samples, drawn, strict=True):
        question, num_images = sample.conversations[-1].user, len(sample.images)
        items.append(
            GalleryItem(item.prediction, question, tuple(pictures), num_images, item.before)
        )
    return items, ""


def _choose(predictions: Sequence[Prediction]) -> list[int]:
    """Numbers of those that are shown, in order."""
    wrong = [number for number, p in enumerate(predictions) if p.correct is False]
    others = [number for number, p in enumerate(predictions) if p.correct is not False]
    half = MOST_ANSWERS // 2
    num_wrong = min(len(wrong), max(half, MOST_ANSWERS - len(others)))
    num_others = min(len(others), MOST_ANSWERS - num_wrong)
    chosen = [wrong[i] for i in spread(len(wrong), num_wrong)]
    chosen += [others[i] for i in spread(len(others), num_others)]
    return sorted(chosen)


def _find_rows(
    reader: ShardReader, predictions: Sequence[Prediction], numbers: Sequence[int]
) -> list[int]:
    """Rows of the predictions: answers are in the order of the data, unless those are others.

    Raises:
        ValueError: a sample that the shards don't hold.
    """
    if all(n < len(reader) and reader.id(n) == predictions[n].id for n in numbers):
        return list(numbers)
    row_of = {reader.id(row): row for row in range(len(reader))}
    missing = [predictions[n].id for n in numbers if predictions[n].id not in row_of]
    if missing:
        raise ValueError(f"{reader.store.name} holds no sample {missing[0]!r} any more")
    return [row_of[predictions[n].id] for n in numbers]


def _draw(
    reader: ShardReader, rows: Sequence[int], num_images: Sequence[int]
) -> list[list[Thumbnail]]:
    """The first so many pictures of each row."""
    with tempfile.TemporaryDirectory(prefix="phi3v-report-") as folder:
        groups: list[list[str]] = []
        for number, (row, count) in enumerate(zip(rows, num_images, strict=True)):
            images = reader[row].images[:count]
            files = [f"{folder}/{number}.{k}" for k in spread(len(images), MOST_PICTURES)]
            for file, k in zip(files, spread(len(images), MOST_PICTURES), strict=True):
                Path(file).write_bytes(images[k])
            groups.append(files)
        plan = plan_thumbnails(groups, MOST_BYTES * 3 / 4)  # base64 writes three bytes as four
        edge_px = min(plan.edge_px, LONGEST_EDGE_PX)
        kept = [[files[k] for k in spread(len(files), plan.max_per_group)] for files in groups]
        pictures = dict(draw([file for files in kept for file in files], edge_px))
    return [[pictures[file] for file in files] for files in kept]
