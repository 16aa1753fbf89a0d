"""The batch: several samples in one row, no padding. The one place where its shapes are defined.

Legend

    T  tokens of the row        S  samples in it
    I  images of all samples    C  local crops of all images, real ones only

A row of two samples, the first with one image of 2 x 2 crops:

    input_ids     1 32010 .. 32044 x 757 1 .. 32000 | 1 32010 .. 32000          (T,)
    labels        -100 ...                319 6635  | -100 ...       278        (T,)
    position_ids  0 1 2 ...                    780  | 0 1 2 ...                 (T,)
    cu_seqlens    0                              781                 T          (S + 1,)
    crop_grid     [[2, 2]]                                                      (I, 2)
    pixel_values  the four crops                                                (C, 3, 336, 336)

Pixels stay uint8 and the global view is left out: both are made on the device, so the loader
ships a quarter of the bytes and does none of the float work.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Int32, Int64, UInt8
from numpy.typing import NDArray
from phi3v_data.images import ImageError, decode_image
from phi3v_data.schema import Sample
from torch import Tensor

from phi3v_train.chat import IGNORE_INDEX, ChatEncoder
from phi3v_train.hd_transform import CROP, Resize, hd_crops, hd_layout


@dataclass(frozen=True, slots=True)
class Batch:
    """One packed row; see the legend above."""

    input_ids: Int64[Tensor, "T"]
    """Image slots hold one image-token id, never negative numbers."""
    labels: Int64[Tensor, "T"]
    """Aligned with `input_ids` (the loss shifts); -100 where no loss."""
    position_ids: Int64[Tensor, "T"]
    """Start at 0 in every sample."""
    cu_seqlens: Int32[Tensor, "S+1"]
    """Bounds of the samples in the row."""
    max_seqlen: int
    """Length of the longest sample, known on the host."""
    sample_ids: tuple[str, ...]
    """For every message that names data."""
    pixel_values: UInt8[Tensor, "C 3 336 336"]
    """Local crops of all images in reading order, row by row within an image."""
    crop_grid: Int32[Tensor, "I 2"]
    """(rows, columns) of local crops of each image; on the host, since it steers shapes."""
    num_label_tokens: int
    """How many positions carry loss, known on the host: the step's loss is divided by the sum
    over all rows and ranks."""

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with its tensors on `device`; `crop_grid` stays on the host."""
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor) and field.name != "crop_grid"
        }
        return replace(self, **moved)


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """A sample, encoded: what a row is made of."""

    sample_id: str
    input_ids: Int[NDArray[np.int64], "T"]
    labels: Int[NDArray[np.int64], "T"]
    crops: UInt8[NDArray[np.uint8], "C 3 336 336"]
    crop_grid: Int[NDArray[np.int32], "I 2"]


class SampleEncoder:
    """Samples with their encoded image bytes to `EncodedSample`, at one crop count.

    Args:
        chat: the tokenizer's side.
        num_crops: most local crops an image may have.
        resize: `exact`, or `fast`; see `phi3v_train.hd_transform`.
    """

    def __init__(self, chat: ChatEncoder, num_crops: int, resize: Resize = "exact") -> None:
        self.chat = chat
        self.num_crops = num_crops
        self.resize: Resize = resize

    def __call__(
        self,
        sample: Sample,
        images: Sequence[bytes | memoryview],
        *,
        for_generation: bool = False,
    ) -> EncodedSample:
        """Encode one sample.

        Args:
            sample: the conversation.
            images: encoded bytes (JPEG, PNG, ...) of its images, in reading order.
            for_generation: leave the last answer out and end with `<|assistant|>`.

        Raises:
            ValueError: an image that does not decode or has no layout, or text that does not
                match the images; the message names the sample and the image.
        """
        crops: list[NDArray[np.uint8]] = []
        grids: list[tuple[int, int]] = []
        for path, data in zip(sample.images, images, strict=True):
            try:
                picture = decode_image(data)
                crops.append(hd_crops(picture, self.num_crops, self.resize))
                grids.append(hd_layout(*picture.size, self.num_crops).grid)
            except (ImageError, ValueError) as error:
                raise ValueError(f"sample {sample.id!r}, image {path!r}: {error}") from error
        text = self.chat.encode_text(sample, for_generation=for_generation)
        input_ids, labels = self.chat.assemble(text, grids)
        return EncodedSample(
            sample_id=sample.id,
            input_ids=input_ids,
            labels=labels,
            crops=_joined(crops) if crops else np.zeros((0, 3, CROP, CROP), dtype=np.uint8),
            crop_grid=np.array(grids, dtype=np.int32).reshape(-1, 2),
        )

    def measure(self, sample: Sample, sizes_wh: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """(tokens, crops) of a sample from its text and image sizes alone, no pixel read.

        Crops count the global view of each image too: what the vision tower runs.
        """
        layouts = [hd_layout(width, height, self.num_crops) for width, height in sizes_wh]
        num_text = self.chat.encode_text(sample).num_tokens
        num_tokens = num_text + sum(layout.num_tokens for layout in layouts)
        return num_tokens, sum(layout.grid[0] * layout.grid[1] + 1 for layout in layouts)


Allocate = Callable[[tuple[int, ...], "np.dtype[Any]"], NDArray[Any]]
"""Makes an array of a shape and dtype, to be filled."""


def collate(samples: Sequence[EncodedSample], allocate: Allocate | None = None) -> Batch:
    """Put encoded samples into one row, in the order given.

    Args:
        samples: at least one.
        allocate: where the row's arrays go; none: ordinary memory.

    Raises:
        ValueError: no samples; an idle rank gets `dummy_row`.
    """
    if not samples:
        raise ValueError("a row needs at least one sample, got none")
    lengths = [len(sample.input_ids) for sample in samples]
    bounds = np.cumsum([0, *lengths], dtype=np.int32)
    labels = _joined([sample.labels for sample in samples], allocate)
    return Batch(
        input_ids=torch.from_numpy(_joined([sample.input_ids for sample in samples], allocate)),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(_joined([np.arange(n) for n in lengths], allocate)),
        cu_seqlens=torch.from_numpy(_joined([bounds], allocate)),
        max_seqlen=max(lengths),
        sample_ids=tuple(sample.sample_id for sample in samples),
        pixel_values=torch.from_numpy(_joined([sample.crops for sample in samples], allocate)),
        crop_grid=torch.from_numpy(_joined([sample.crop_grid for sample in samples], allocate)),
        num_label_tokens=int((labels != IGNORE_INDEX).sum()),
    )


def _joined(arrays: Sequence[NDArray[Any]], allocate: Allocate | None = None) -> NDArray[Any]:
    """All in one array; in ordinary memory a single one, a large page's crops, is not copied."""
    if allocate is None:
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    shape = (sum(len(array) for array in arrays), *arrays[0].shape[1:])
    return np.concatenate(arrays, out=allocate(shape, arrays[0].dtype))


def dummy_sample(token_id: int) -> EncodedSample:
    """One token without loss: what the row of a rank is made of that has nothing to do in a step.

    Its gradient is zero everywhere, but it is there: all ranks then run the same number of
    backward passes.
    """
    return EncodedSample(
        sample_id="",
        input_ids=np.array([token_id], dtype=np.int64),
        labels=np.array([IGNORE_INDEX], dtype=np.int64),
        crops=np.zeros((0, 3, CROP, CROP), dtype=np.uint8),
        crop_grid=np.zeros((0, 2), dtype=np.int32),
    )


def dummy_row(token_id: int) -> Batch:
    """A row of `dummy_sample` alone."""
    return collate([dummy_sample(token_id)])
