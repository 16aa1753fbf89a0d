"""The sample: one conversation about some images, the unit everything here works on.

One line of a conversations JSONL file:

    {"id": "val-0000000300", "source": "ucf101", "conversations": [
      {"images": ["val/BabyCrawling/v_BabyCrawling_g21_c04.0.jpg", "..."],
       "user": "Classify the video into one of the following classes: ...",
       "assistant": "BabyCrawling"}]}

This module knows structure only: which keys there are, their types, what may be empty. What a
text or a path may hold is checked by `phi3v_data.rules`, where each finding has a code.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, Strict, model_validator

ImagePaths = Annotated[tuple[str, ...], Strict(False)]
"""A tuple that also takes a list; its items stay strict."""

MetadataValue = str | int | float | bool | None


class _Record(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,  # not JSON: pydantic would read NaN and write null
    )


class Turn(_Record):
    """One question and its answer."""

    images: ImagePaths = ()
    """Relative POSIX paths under the image root, in reading order; may be empty."""

    user: str
    """The prompt. `<|image_k|>` places the k-th image of this turn (k from 1); without any such
    mark the images come first."""

    assistant: str | None = None
    """The answer to learn. Absent only in the last turn of a test split."""

    answers: Annotated[tuple[str, ...], Strict(False)] | None = None
    """All accepted answers, where there are several; `assistant` is the first of them."""

    @model_validator(mode="after")
    def _first_answer_is_assistant(self) -> "Turn":
        if self.answers is not None:
            if not self.answers:
                raise ValueError("answers is empty; leave it out, or list the accepted answers")
            if self.assistant != self.answers[0]:
                raise ValueError(
                    f"assistant must be the first of answers: expected {self.answers[0]!r}, "
                    f"got {self.assistant!r}"
                )
        return self


class Sample(_Record):
    """One conversation: an id, where it comes from, and its turns."""

    id: Annotated[str, Field(min_length=1)]
    """Unique within a file."""

    source: Annotated[str, Field(min_length=1)]
    """The data set it comes from, for example `ucf101`."""

    conversations: Annotated[tuple[Turn, ...], Field(min_length=1), Strict(False)]
    """The turns, oldest first."""

    metadata: dict[str, MetadataValue] | None = None
    """Flat and free: carried along, never read."""

    @model_validator(mode="after")
    def _answer_missing_only_at_the_end(self) -> "Sample":
        for position, turn in enumerate(self.conversations[:-1]):
            if turn.assistant is None:
                raise ValueError(
                    f"conversations[{position}] has no assistant; only the last turn may lack one"
                )
        return self

    @property
    def images(self) -> tuple[str, ...]:
        """The image paths of all turns, in reading order."""
        return tuple(path for turn in self.conversations for path in turn.images)

    def to_json(self) -> str:
        """The sample as one JSONL line without its line break; absent fields are left out."""
        return self.model_dump_json(exclude_none=True)

    @classmethod
    def from_json(cls, line: str | bytes) -> "Sample":
        """Read one JSONL line.

        Raises:
            pydantic.ValidationError: it is not JSON, or not a sample.
        """
        return cls.model_validate_json(line)


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of one JSONL line, for editors and other languages."""
    schema = Sample.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
