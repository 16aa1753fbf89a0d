"""What a data set asks: every turn of a conversation, after those before it as the data has them.

    question = list_questions(reader, 2)[1]     # Question(sample=0, turn=1)
    asked(reader.sample(0), question.turn)      # the sample up to that turn: its prompt

A conversation whose last turn has no answer (a test split's) asks that one alone: the others are
there to be read.
"""

from typing import NamedTuple

from phi3v_data.schema import Sample
from phi3v_data.shards import ShardReader


class Question(NamedTuple):
    """One turn of one sample."""

    sample: int
    """Its number in the shards."""
    turn: int
    """From 0."""


def list_questions(reader: ShardReader, count: int) -> list[Question]:
    """The questions of the first `count` samples, in the order of the data."""
    return [
        Question(number, turn)
        for number in range(count)
        for turn in turns_asked(reader.sample(number))
    ]


def turns_asked(sample: Sample) -> range:
    """Turns of a conversation that are questions."""
    count = len(sample.conversations)
    has_answers = sample.conversations[-1].assistant is not None
    return range(count) if has_answers else range(count - 1, count)


def asked(sample: Sample, turn: int) -> Sample:
    """The conversation up to a turn, which is its last."""
    turns = sample.conversations
    if turn == len(turns) - 1:
        return sample
    return sample.model_copy(update={"conversations": turns[: turn + 1]})
