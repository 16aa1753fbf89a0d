"""`schema.Sample` for speed: decoded by msgspec, which checks types and keys only."""

import msgspec

MetadataValue = str | int | float | bool | None


class QuickTurn(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """`schema.Turn`, for speed."""

    user: str
    images: list[str] | msgspec.UnsetType = msgspec.UNSET
    assistant: str | msgspec.UnsetType | None = msgspec.UNSET
    answers: list[str] | msgspec.UnsetType | None = msgspec.UNSET


class QuickSample(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """`schema.Sample`, for speed."""

    id: str
    source: str
    conversations: list[QuickTurn]
    metadata: dict[str, MetadataValue] | msgspec.UnsetType | None = msgspec.UNSET


def num_keys(sample: QuickSample) -> int:
    """Keys that a sample is made of: in JSON there are more where one is there twice."""
    unset = msgspec.UNSET
    number = 3 + len(sample.conversations)
    for turn in sample.conversations:
        number += (
            (turn.images is not unset) + (turn.assistant is not unset) + (turn.answers is not unset)
        )
    if sample.metadata is not unset:
        number += 1 + (len(sample.metadata) if sample.metadata else 0)
    return number
