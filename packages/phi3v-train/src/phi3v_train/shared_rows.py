"""A row in memory that two processes share, with no name and no copy.

    handle, num_bytes = share_row(samples)      # in the worker: a file descriptor to hand over
    row = open_shared_row(handle, num_bytes)    # in the trainer: a Batch over the same memory

The memory is a `memfd`: it has no name, so that nothing is left in /dev/shm whoever dies when, it
is not bound by the size of /dev/shm (64 MB in many containers), and it is gone when the last tensor
on it is. (Shared tensors of torch.multiprocessing have a name for a moment or for long, depending
on their strategy, and are bound by it.)

    | 8,129,024 bytes of arrays, each at a multiple of 64 | a pickle: where each is, and the rest |
"""

import mmap
import os
import pickle
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phi3v_train.collator import Batch, EncodedSample, collate

ALIGNMENT = 64
"""Of every array, in bytes: a cache line."""

_TOKEN_BYTES = 3 * 8
"""input_ids, labels and position_ids."""


def row_bytes(num_tokens: int, num_samples: int, num_images: int, num_local_crops: int) -> int:
    """Most bytes that the arrays of a row take; known before any of them is there."""
    crops = num_local_crops * 3 * 336 * 336
    small = num_tokens * _TOKEN_BYTES + (num_samples + 1) * 4 + num_images * 8
    return crops + small + len(fields(Batch)) * ALIGNMENT


class _Memory:
    """Unnamed shared memory that arrays are cut from, one after the other."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.handle = os.memfd_create("phi3v-row", os.MFD_CLOEXEC)
        os.ftruncate(self.handle, num_bytes)
        self._bytes = np.frombuffer(mmap.mmap(self.handle, num_bytes), dtype=np.uint8)
        self._used = 0

    def take(self, shape: tuple[int, ...], dtype: "np.dtype[Any]") -> NDArray[Any]:
        start = -(-self._used // ALIGNMENT) * ALIGNMENT
        self._used = start + int(np.prod(shape)) * dtype.itemsize
        assert self._used <= self.num_bytes, f"{self._used} bytes of {self.num_bytes}"
        return self._bytes[start : self._used].view(dtype).reshape(shape)

    def offset(self, tensor: Tensor) -> int:
        return tensor.data_ptr() - self._bytes.ctypes.data if tensor.numel() else 0


def share_row(samples: Sequence[EncodedSample]) -> tuple[int, int]:
    """Collate samples in shared memory.

    Returns:
        A file descriptor, for the caller to close, and the size of the arrays in it in bytes.
    """
    memory = _Memory(
        row_bytes(
            num_tokens=sum(len(sample.input_ids) for sample in samples),
            num_samples=len(samples),
            num_images=sum(len(sample.crop_grid) for sample in samples),
            num_local_crops=sum(len(sample.crops) for sample in samples),
        )
    )
    row = collate(samples, memory.take)
    places: list[tuple[str, int, tuple[int, ...], torch.dtype]] = []
    rest: dict[str, Any] = {}
    for field in fields(Batch):
        value = getattr(row, field.name)
        if isinstance(value, Tensor):
            places.append((field.name, memory.offset(value), tuple(value.shape), value.dtype))
        else:
            rest[field.name] = value
    _append(memory.handle, memory.num_bytes, (places, rest))
    return memory.handle, memory.num_bytes


def share_failure(failure: tuple[Any, ...]) -> tuple[int, int]:
    """Put a small record, here what went wrong, where otherwise a row is; read by `open_record`."""
    handle = os.memfd_create("phi3v-failure", os.MFD_CLOEXEC)
    _append(handle, 0, failure)
    return handle, 0


def open_shared_row(handle: int, num_bytes: int) -> Batch:
    """The row behind a descriptor of `share_row`; its tensors are that memory. Closes `handle`."""
    size = os.fstat(handle).st_size
    # All pages at once: a fault for each would cost as much as copying a tenth of it.
    memory = mmap.mmap(handle, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    os.close(handle)
    places, rest = pickle.loads(memory[num_bytes:])
    whole = torch.frombuffer(memory, dtype=torch.uint8)  # lives as long as any tensor made of it
    tensors = {
        name: whole[start : start + _size(shape, dtype)].view(dtype).reshape(shape)
        for name, start, shape, dtype in places
    }
    return Batch(**tensors, **rest)


def open_record(handle: int) -> tuple[Any, ...]:
    """What `share_failure` put there. Closes `handle`."""
    with open(handle, "rb") as file:
        file.seek(0)
        return pickle.loads(file.read())


def _append(handle: int, start: int, record: tuple[Any, ...]) -> None:
    content = memoryview(pickle.dumps(record, pickle.HIGHEST_PROTOCOL))
    while content:
        written = os.pwrite(handle, content, start)
        content, start = content[written:], start + written


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return int(np.prod(shape)) * dtype.itemsize
