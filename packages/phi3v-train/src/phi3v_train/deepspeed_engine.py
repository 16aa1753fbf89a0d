"""DeepSpeed's ZeRO: moments (stage 1), gradients (2) and weights (3) in shares over the ranks.

    engine = DeepSpeedEngine(training, world, build_optimizer, stage=2, max_grad_norm=1.0)

In bf16 and fp16 the weights themselves are of that type, and float32 masters of them are in the
optimizer's shares: a device holds 2 bytes a parameter instead of 4. fp16 uses DeepSpeed's own
loss scaling. What is offloaded is updated on the host by torch's fused AdamW, so that nothing has
to be compiled: a build that is killed leaves a lock on which every later run would wait.

Rows of a step are ours to count: DeepSpeed is told which of them is the last. Stages 2 and 3 still
join gradients after every row, since no rank has room for all of them. The only module that
imports deepspeed.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from phi3v_train.collator import Batch
from phi3v_train.engine import BuildOptimizer, PackedLoss, StateFormat, World
from phi3v_train.methods import TrainingModel
from phi3v_train.whole_model import filled, model_skeleton

_TAG = "zero"
"""Name of the folder that DeepSpeed makes in a checkpoint."""


class DeepSpeedEngine:
    """`zero1`, `zero2`, `zero3`; see `phi3v_train.engine.Engine`.

    Args:
        training: of `prepare`, on the host.
        world: of `join_world`; one process is a world too, where it offloads.
        build_optimizer: of the parameters that train.
        stage: 1, 2 or 3.
        max_grad_norm: gradients are clipped to this global norm.
        offload_optimizer: keep masters and moments in host memory, and update there.
        offload_parameters: keep the shares of the weights there too (stage 3).
    """

    state_format: StateFormat = "deepspeed"

    def __init__(
        self,
        training: TrainingModel,
        world: World,
        build_optimizer: BuildOptimizer,
        *,
        stage: int,
        max_grad_norm: float,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
    ) -> None:
        self.name = f"zero{stage}"
        self.world = world
        self.training = training
        self._stage = stage
        self._skeleton = model_skeleton(training)
        self._reached = _watch_gradients(training)
        with _quiet_deepspeed():
            deepspeed = _import_deepspeed(world)
            optimizer = build_optimizer(training.trainable)
            if offload_optimizer or offload_parameters:
                _fuse(optimizer)
            self._engine, self.optimizer, _, _ = deepspeed.initialize(
                model=PackedLoss(training.model),
                optimizer=optimizer,
                config=_config(
                    stage,
                    training.autocast_dtype,
                    world,
                    max_grad_norm=max_grad_norm,
                    offload_optimizer=offload_optimizer or offload_parameters,
                    offload_parameters=offload_parameters,
                ),
                dist_init_required=False,
            )

    def loss_sum(self, batch: Batch, *, is_last: bool) -> Tensor:
        """Forward pass of one row: the sum of its losses."""
        self._engine.set_gradient_accumulation_boundary(is_last)
        return self._engine(batch.to(self.world.device))

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradients of `loss`; after the last row each rank holds its share of them."""
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def without_gradient(self) -> list[str]:
        """Names of the parameters that got no gradient."""
        return [name for name in self.training.trainable if name not in self._reached]

    def step(self) -> float:
        """Clip, update and clear the gradients; the global gradient norm before clipping."""
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def whole(self, dtype: torch.dtype | None = None) -> TrainingModel:
        """A copy with whole weights, on every rank; trained ones from the float32 masters."""
        from deepspeed.utils import safe_get_full_fp32_param

        weights: dict[str, Tensor] = {}
        for name, parameter in self.training.model.named_parameters():
            if parameter.requires_grad:
                tensor = safe_get_full_fp32_param(parameter)
                assert tensor is not None, name
                tensor = tensor.detach().to(self.world.device)
            else:
                tensor = self._frozen(parameter)
            weights[name] = tensor if dtype is None else tensor.to(dtype)
        return filled(self._skeleton, weights)

    def _frozen(self, parameter: nn.Parameter) -> Tensor:
        if self._stage < 3:
            return parameter.detach()
        from deepspeed import zero

        with zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def save(self, folder: Path) -> None:
        """Write DeepSpeed's files of weights that train, masters, moments and loss scale."""
        with _quiet_deepspeed():
            self._engine.save_checkpoint(
                str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=True
            )

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, in as many processes as there were then.

        Raises:
            ValueError: the files are damaged, of another number of processes, or of a stage that
                shares out other things.
        """
        from deepspeed.runtime.zero.utils import ZeRORuntimeException

        self._check_writers(folder)
        try:
            with _quiet_deepspeed():
                path, _ = self._engine.load_checkpoint(
                    str(folder), tag=_TAG, load_module_strict=False, load_lr_scheduler_states=False
                )
        except (ZeRORuntimeException, OSError, EOFError, KeyError, RuntimeError) as error:
            reason = " ".join(f"{type(error).__name__} {error}".split())
            raise ValueError(f"{folder} cannot be read: {reason}") from error
        if path is None:
            raise ValueError(f"{folder} cannot be read: DeepSpeed finds no files of its own in it")

    def _check_writers(self, folder: Path) -> None:
        """DeepSpeed itself would end in an assertion, or read another process's share."""
        files = folder / _TAG
        writers = len(list(files.glob("*_optim_states.pt")))  # one of each process
        if writers == 0:
            raise ValueError(f"{folder} cannot be read: it has no files of DeepSpeed in {_TAG}/")
        if writers != self.world.world_size:
            raise ValueError(
                f"{folder} cannot be read: its files were written by {writers} processes, and "
                f"{self.world.world_size} would read them, which DeepSpeed cannot; go on with "
                f"{writers}"
            )
        were_shared = not (files / "mp_rank_00_model_states.pt").exists()  # the weights
        if were_shared != (self._stage == 3):
            able = "zero3" if were_shared else "zero1 or zero2"
            raise ValueError(
                f"{folder} cannot be read: {self.name} shares out other things than the engine "
                f"that wrote it; go on with parallel.engine={able}"
            )


def _watch_gradients(training: TrainingModel) -> set[str]:
    """Filled with the names of parameters that a backward pass reaches.

    DeepSpeed's `safe_get_full_grad` gives zeros for what was never reached, and takes gradients
    from the parameters as soon as they come.
    """
    reached: set[str] = set()

    def note(name: str) -> Callable[[Tensor], None]:
        return lambda _: reached.add(name)

    for name, parameter in training.trainable.items():
        parameter.register_post_accumulate_grad_hook(note(name))
    return reached


def _config(
    stage: int,
    dtype: torch.dtype | None,
    world: World,
    *,
    max_grad_norm: float,
    offload_optimizer: bool,
    offload_parameters: bool,
) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage}
    host = {"device": "cpu", "pin_memory": world.device.type == "cuda"}
    if offload_optimizer:
        zero["offload_optimizer"] = host
    if offload_parameters:
        zero["offload_param"] = host
    return {
        # what DeepSpeed must be told and does not use: rows and steps are counted here
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 2**62,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": dtype is torch.bfloat16},
        "fp16": {"enabled": dtype is torch.float16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _import_deepspeed(world: World) -> Any:
    """DeepSpeed on the devices of this run, in its process group."""
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)  # else it looks, and says so
    os.environ.setdefault("LOCAL_RANK", str(world.device.index or 0))
    world.join_group()
    import deepspeed
    from deepspeed import ops
    from deepspeed.utils import groups

    # DeepSpeed remembers its copy of the group of this process's last run, which that run has left.
    if not _is_alive(groups._WORLD_GROUP):
        groups._WORLD_GROUP = None
    # Sums over shared memory on CPUs: an op to build, where gloo does as well.
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


def _is_alive(group: Any) -> bool:
    try:
        dist.get_process_group_ranks(group)
    except KeyError:
        return False
    return True


def _fuse(optimizer: torch.optim.Optimizer) -> None:
    """One pass over weights and moments, where they are by the time they are updated.

    Raises:
        ValueError: an optimizer that can't be fused.
    """
    if type(optimizer) is not torch.optim.AdamW:
        raise ValueError(
            f"parallel.offload_optimizer updates with AdamW on the host, got "
            f"{type(optimizer).__name__}; set optim.name=adamw, or do not offload"
        )
    for group in optimizer.param_groups:
        group.update(fused=True, foreach=False)


@contextmanager
def _quiet_deepspeed() -> Iterator[None]:
    """Inside the block DeepSpeed says what went wrong, and nothing else."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
