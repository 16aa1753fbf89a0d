"""The whole model on every device: one device alone, or several under DistributedDataParallel.

    engine = ReplicatedEngine(training, world, build_optimizer, max_grad_norm=1.0)

One device needs no wrapping. Several average their gradients in the last backward pass of a step.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from phi3v_train.collator import Batch
from phi3v_train.engine import BuildOptimizer, PackedLoss, StateFormat, World
from phi3v_train.engine_state import load_state, save_state
from phi3v_train.methods import TrainingModel, move
from phi3v_train.quiet import quiet


class ReplicatedEngine:
    """`single` and `ddp`; see `phi3v_train.engine.Engine`.

    Args:
        training: of `prepare`; it is moved to the device.
        world: of `join_world`.
        build_optimizer: of the parameters that train.
        max_grad_norm: gradients are clipped to this global norm.
    """

    state_format: StateFormat = "dcp"

    def __init__(
        self,
        training: TrainingModel,
        world: World,
        build_optimizer: BuildOptimizer,
        *,
        max_grad_norm: float,
    ) -> None:
        self.name = "single" if world.world_size == 1 else "ddp"
        self.world = world
        self.training = training
        self.max_grad_norm = max_grad_norm
        move(training.model, world.device)
        self.module: nn.Module = PackedLoss(training.model)
        if world.world_size > 1:
            # Its successor is newer than torch 2.11.
            with quiet("`broadcast_buffers` is deprecated"):
                self.module = DistributedDataParallel(
                    self.module,
                    device_ids=[world.device.index] if world.device.type == "cuda" else None,
                    broadcast_buffers=False,
                    gradient_as_bucket_view=True,
                )
        self.optimizer = build_optimizer(training.trainable)
        # Gradients of a float16 loss would vanish; scaled up they survive.
        self.scaler = torch.amp.GradScaler(
            world.device.type, enabled=training.autocast_dtype is torch.float16
        )

    def loss_sum(self, batch: Batch, *, is_last: bool) -> Tensor:
        """Forward pass of one row: the sum of its losses."""
        with self._synchronising(is_last), self._autocast():
            return self.module(batch.to(self.world.device))

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradients of `loss`; after the last row all ranks hold their average."""
        with self._synchronising(is_last):
            self.scaler.scale(loss).backward()

    def without_gradient(self) -> list[str]:
        """Names of the parameters that got no gradient."""
        return [name for name, p in self.training.trainable.items() if p.grad is None]

    def step(self) -> float:
        """Clip, update and clear the gradients; the global gradient norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.training.trainable.values(), self.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def whole(self, dtype: torch.dtype | None = None) -> TrainingModel:
        """The running model itself."""
        return self.training

    def save(self, folder: Path) -> None:
        """Write weights, moments and loss scale."""
        save_state(
            folder,
            self.training,
            self.optimizer,
            self.scaler,
            world_size=self.world.world_size,
        )

    def load(self, folder: Path) -> None:
        """Read what an engine of this format wrote."""
        load_state(
            folder,
            self.training,
            self.optimizer,
            self.scaler,
            world_size=self.world.world_size,
        )

    def _synchronising(self, is_last: bool) -> Any:
        if isinstance(self.module, DistributedDataParallel) and not is_last:
            return self.module.no_sync()
        return nullcontext()

    def _autocast(self) -> Any:
        if self.training.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.world.device.type, dtype=self.training.autocast_dtype)
