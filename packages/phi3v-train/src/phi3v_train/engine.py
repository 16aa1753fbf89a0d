"""One small interface over one device and many, and the processes that share a run.

    world = join_world("auto")                  # torchrun's or Slurm's variables, if there are any
    engine = make_engine(choice, training, world, build_optimizer, max_grad_norm=1.0)
    loss = engine.loss_sum(row, is_last=True)    # forward; a scalar
    engine.backward(loss * factor, is_last=True)
    norm = engine.step()

    single, ddp    replicated_engine.py    every device has the whole model
    fsdp2          sharded_engine.py       weights, gradients and moments in shares
    zero1 2 3      deepspeed_engine.py     DeepSpeed: moments, gradients, weights in shares

Gradients are averaged over the ranks, so the trainer multiplies by the world size where it wants a
sum; they are joined in the last backward pass of a step only, where the engine allows it.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from phi3v_train.collator import Batch
from phi3v_train.methods import TrainingModel
from phi3v_train.modeling_phi3_v import Phi3VForCausalLM
from phi3v_train.rank_place import rank_place

_MEETING_TIME = timedelta(minutes=30)
"""In which all processes must have come; torch's own default for gloo."""


@dataclass(frozen=True, slots=True)
class World:
    """This process among all of the run."""

    rank: int
    world_size: int
    device: torch.device
    owns_group: bool = True
    """Whether `leave` ends the process group; not one that was there before."""

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

    def join_group(self) -> None:
        """Be in a process group even if alone: some engines want one."""
        if not dist.is_initialized():
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]  # it is documented
            dist.init_process_group(
                _backend(self.device), store=store, rank=self.rank, world_size=1
            )

    def leave(self) -> None:
        """Leave the process group, if there is one of our own."""
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()


def join_world(device: str = "auto") -> World:
    """Find out who we are and, with several processes, join the others.

    A process group that is there already is used, and left to whoever made it: one group can do
    many runs.

    Args:
        device: `auto`, `cpu` or `cuda`.

    Raises:
        ValueError: `cuda` was asked for and there is none, or none for this process; or the
            environment says that there are other processes, but not where.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no CUDA device; use device=auto or cpu")
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    place = rank_place(os.environ)
    chosen = torch.device("cpu")
    if use_cuda:
        chosen = torch.device("cuda", place.device_index(torch.cuda.device_count()))
        torch.cuda.set_device(chosen)
    if dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size(), chosen, owns_group=False)
    if place.world_size > 1:
        os.environ.update(place.rendezvous)
        dist.init_process_group(
            _backend(chosen),
            store=_own_store(place.rank, place.world_size),
            rank=place.rank,
            world_size=place.world_size,
            device_id=chosen if use_cuda else None,
        )
    return World(place.rank, place.world_size, chosen)


def _own_store(rank: int, world_size: int) -> Any:
    """The store where the processes meet, as if no earlier group of theirs had been there.

    torchrun's outlives a group. The next one would read addresses that the last one left, call
    where nobody listens any more, and wait for ever.
    """
    store, _, _ = next(rendezvous("env://", rank, world_size, timeout=_MEETING_TIME))
    number = store.add(f"groups of process {rank}", 1)
    return dist.PrefixStore(f"group {number}", store)  # pyright: ignore[reportPrivateImportUsage]


def _backend(device: torch.device) -> str:
    """On GPUs gloo too: what is offloaded is reduced on the host."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


class PackedLoss(nn.Module):
    """`packed_loss` as a forward pass, since that is what wrappers wrap."""

    def __init__(self, model: Phi3VForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """Sum of the losses at the label positions of a row."""
        return self.model.packed_loss(batch)


BuildOptimizer = Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer]
"""Makes the optimizer of the parameters that train, by name."""

StateFormat = Literal["dcp", "deepspeed"]


class Engine(Protocol):
    """Forward, backward and update over one device or many."""

    name: str
    """As in `parallel.engine`."""
    world: World
    training: TrainingModel
    """What trains; its parameters may be shares of the whole ones."""
    optimizer: torch.optim.Optimizer
    """Its `param_groups` hold the learning rates."""
    state_format: StateFormat
    """`dcp`: any number of ranks and any engine with this format reads what `save` wrote."""

    def loss_sum(self, batch: Batch, *, is_last: bool) -> Tensor:
        """Forward pass of one row: the sum of its losses.

        Args:
            batch: on the host or the device.
            is_last: of the step's rows on this rank; its backward pass joins the ranks.
        """
        ...

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradients of `loss`; after the last row they are averaged over the ranks."""
        ...

    def without_gradient(self) -> list[str]:
        """After the last backward pass of a step: names of the parameters that got no gradient."""
        ...

    def step(self) -> float:
        """Clip, update and clear the gradients; the global gradient norm before clipping."""
        ...

    def whole(self, dtype: torch.dtype | None = None) -> TrainingModel:
        """The model with whole weights, on every rank, to evaluate or to save.

        The running model itself where it is whole, else a copy. All ranks call it.

        Args:
            dtype: of a copy's floating-point weights; None: as they train.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write the weights that train, the moments and the loss scale. All ranks call it."""
        ...

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. All ranks call it.

        Raises:
            ValueError: the files are damaged, or hold other tensors.
        """
        ...
