"""Weights, gradients and moments in shares, one per rank: torch's `fully_shard` (FSDP2).

    engine = ShardedEngine(training, world, build_optimizer, max_grad_norm=1.0)

A decoder or CLIP layer is gathered when it runs and let go after it; what is outside the layers
stays gathered from the forward to the end of the backward pass. Between the rows of a step
gradients stay where they are (whole, on every rank) and are joined in the last row.

In bf16 and fp16 the layers compute in that type; shares and the joined gradients are float32.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from phi3v_train.collator import Batch
from phi3v_train.engine import BuildOptimizer, PackedLoss, StateFormat, World
from phi3v_train.engine_state import load_state, save_state
from phi3v_train.methods import TrainingModel
from phi3v_train.modeling_phi3_v import CLIPLayer, Phi3VDecoderLayer
from phi3v_train.whole_model import filled, model_skeleton


class ShardedEngine:
    """`fsdp2`; see `phi3v_train.engine.Engine`.

    Args:
        training: of `prepare`, on the host; its parameters become shares, layer by layer.
        world: of `join_world`.
        build_optimizer: of the parameters that train.
        max_grad_norm: gradients are clipped to this global norm.
        offload: keep shares and moments in host memory, but for the layers at work.
    """

    name = "fsdp2"
    state_format: StateFormat = "dcp"

    def __init__(
        self,
        training: TrainingModel,
        world: World,
        build_optimizer: BuildOptimizer,
        *,
        max_grad_norm: float,
        offload: bool = False,
    ) -> None:
        self.world = world
        self.training = training
        self.max_grad_norm = max_grad_norm
        world.join_group()
        self._skeleton = model_skeleton(training)
        module = PackedLoss(training.model)
        mesh = init_device_mesh(world.device.type, (world.world_size,))
        policy = MixedPrecisionPolicy(
            param_dtype=training.autocast_dtype, reduce_dtype=torch.float32
        )
        pins = world.device.type == "cuda"
        offloading = CPUOffloadPolicy(pin_memory=pins) if offload else OffloadPolicy()
        for part in [*_layers(module), module]:
            fully_shard(part, mesh=mesh, mp_policy=policy, offload_policy=offloading)
        assert isinstance(module, FSDPModule)
        self.module: FSDPModule = module
        self.optimizer = build_optimizer(training.trainable)
        self.scaler = torch.amp.GradScaler(
            world.device.type, enabled=training.autocast_dtype is torch.float16
        )

    def loss_sum(self, batch: Batch, *, is_last: bool) -> Tensor:
        """Forward pass of one row: the sum of its losses."""
        self.module.set_requires_gradient_sync(is_last)
        assert isinstance(self.module, nn.Module)
        loss: Tensor = self.module(batch.to(self.world.device))
        if not torch.is_grad_enabled():  # an evaluation: no backward pass shares the root out again
            self.module.reshard()
        return loss

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradients of `loss`; after the last row each rank holds its share of them."""
        self.module.set_requires_gradient_sync(is_last)
        self.scaler.scale(loss).backward()

    def without_gradient(self) -> list[str]:
        """Names of the parameters that got no gradient."""
        return [name for name, p in self.training.trainable.items() if p.grad is None]

    def step(self) -> float:
        """Clip, update and clear the gradients; the global gradient norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.training.trainable.values(), self.max_grad_norm)
        assert isinstance(norm, DTensor)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm.full_tensor())

    def whole(self, dtype: torch.dtype | None = None) -> TrainingModel:
        """A copy with whole weights, on every rank."""
        weights: dict[str, Tensor] = {}
        for name, parameter in self.training.model.named_parameters():
            share = parameter.detach()
            assert isinstance(share, DTensor)
            # an offloaded share is gathered on the device, where the model will run
            moved = share.to(self.world.device)
            assert isinstance(moved, DTensor)
            tensor = moved.full_tensor()
            if tensor.nbytes != tensor.untyped_storage().nbytes():
                tensor = tensor.clone()  # shares of one length were put together, and then cut
            weights[name] = tensor if dtype is None else tensor.to(dtype)
        return filled(self._skeleton, weights)

    def save(self, folder: Path) -> None:
        """Write weights, moments and loss scale."""
        save_state(
            folder, self.training, self.optimizer, self.scaler, world_size=self.world.world_size
        )

    def load(self, folder: Path) -> None:
        """Read what an engine of this format wrote."""
        load_state(
            folder, self.training, self.optimizer, self.scaler, world_size=self.world.world_size
        )


def _layers(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if isinstance(part, Phi3VDecoderLayer | CLIPLayer)]
