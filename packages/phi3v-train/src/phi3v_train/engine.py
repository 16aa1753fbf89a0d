"""Processes and devices: who is in the run, and how gradients of all of them become one.

    world = join_world("auto")                  # rank, world size, device; joins the group
    engine = Engine(model, world)
    loss = engine.loss_sum(batch)               # forward; a scalar
    engine.backward(loss * factor, is_last=True)

One device needs no wrapping. Several run DistributedDataParallel: gradients are averaged over the
ranks in the last backward pass of a step only, so the trainer multiplies by the world size where
it wants a sum. FSDP2 and DeepSpeed belong behind the same few methods.
"""

import os
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from phi3v_train.collator import Batch
from phi3v_train.modeling_phi3_v import Phi3VForCausalLM


@dataclass(frozen=True, slots=True)
class World:
    """This process among all of the run."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """The one process that prints and writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all."""
        if self.world_size > 1:
            dist.barrier()

    def sum(self, *values: int | float) -> list[float]:
        """Sum each value over all ranks, in float64; every rank gets the sums."""
        if self.world_size == 1:
            return [float(value) for value in values]
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def from_main(self, value: Any) -> Any:
        """The main process's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        box: list[Any] = [None] * self.world_size
        dist.all_gather_object(box, value)
        return box

    def leave(self) -> None:
        """Leave the process group, if there is one."""
        if dist.is_initialized():
            dist.destroy_process_group()


def join_world(device: str = "auto") -> World:
    """Find out who we are and, with several processes, join the others.

    Args:
        device: `auto`, `cpu` or `cuda`.

    Raises:
        ValueError: `cuda` was asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no CUDA device; use device=auto or cpu")
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(chosen)
    if world_size > 1:
        dist.init_process_group("nccl" if use_cuda else "gloo")
    return World(rank, world_size, chosen)


class PackedLoss(nn.Module):
    """`packed_loss` as a forward pass, since that is what wrappers wrap."""

    def __init__(self, model: Phi3VForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """Sum of the losses at the label positions of a row."""
        return self.model.packed_loss(batch)


class Engine:
    """Forward and backward over one device or many.

    Args:
        model: on its device, its parameters' `requires_grad` as they will train.
        world: of `join_world`.
        autocast_dtype: dtype of matrix products over float32 weights; None: the weights' own.
    """

    def __init__(
        self, model: Phi3VForCausalLM, world: World, autocast_dtype: torch.dtype | None = None
    ) -> None:
        self.world = world
        self.autocast_dtype = autocast_dtype
        self.module: nn.Module = PackedLoss(model)
        if world.world_size > 1:
            self.module = DistributedDataParallel(
                self.module,
                device_ids=[world.device.index] if world.device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
        # Gradients of a float16 loss would vanish; scaled up they survive.
        self.scaler = torch.amp.GradScaler(
            world.device.type, enabled=autocast_dtype is torch.float16
        )

    def loss_sum(self, batch: Batch, *, is_last: bool) -> Tensor:
        """Forward pass of one row: the sum of its losses.

        Args:
            batch: on the host or the device.
            is_last: of the step's rows on this rank; its backward pass joins the ranks.
        """
        with self._synchronising(is_last), self._autocast():
            return self.module(batch.to(self.world.device))

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradients of `loss`; after the last row all ranks hold their average."""
        with self._synchronising(is_last):
            self.scaler.scale(loss).backward()

    def step(
        self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], max_norm: float
    ) -> float:
        """Clip, update and clear the gradients; the global gradient norm before clipping."""
        self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, max_norm)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def _synchronising(self, is_last: bool) -> Any:
        if isinstance(self.module, DistributedDataParallel) and not is_last:
            return self.module.no_sync()
        return nullcontext()

    def _autocast(self) -> Any:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.world.device.type, dtype=self.autocast_dtype)
