"""Which engine a run gets, and that engine.

parallel = choose_engine(config, model_config, precision, world)    # no `auto` in it any more
engine = make_engine(parallel, training, world, build_optimizer, max_grad_norm=1.0)

adapters              single, ddp              what trains is small: sharing it out saves nothing
full weights          single, ddp, fsdp2       the first that `estimate` says fits a device
and if none fits      zero2 with the optimizer in host memory, zero3 with the weights there too
on CPUs               single, ddp
"""

from collections.abc import Iterator

import torch

from phi3v_train.config import ConfigError, ParallelConfig, TrainConfig
from phi3v_train.configuration_phi3_v import Phi3VConfig
from phi3v_train.engine import BuildOptimizer, Engine, World
from phi3v_train.estimate import estimate_memory
from phi3v_train.methods import Precision, TrainingModel
from phi3v_train.replicated_engine import ReplicatedEngine
from phi3v_train.sharded_engine import ShardedEngine

_SHARES = ("fsdp2", "zero1", "zero2", "zero3")


def choose_engine(
    config: TrainConfig,
    model_config: Phi3VConfig,
    precision: Precision,
    world: World,
    *,
    device_bytes: int | None = None,
) -> ParallelConfig:
    """Resolve `parallel.engine=auto`, and refuse what can't run.

    Args:
        config: of the run.
        model_config: sizes of the model.
        precision: of computing.
        world: of the run.
        device_bytes: memory of a device; None: what this process's device has.

    Returns:
        The same settings with an engine named; `ddp` of one process is `single`.

    Raises:
        ConfigError: an engine that doesn't fit the method, the optimizer or the processes.
    """
    parallel = config.parallel
    if parallel.engine == "auto":
        if device_bytes is None and world.device.type == "cuda":
            device_bytes = torch.cuda.get_device_properties(world.device).total_memory
        parallel = _first_that_fits(config, model_config, precision, world, device_bytes)
    elif parallel.engine == "single" and world.world_size > 1:
        raise ConfigError(
            f"parallel.engine=single trains on one device, got {world.world_size} processes; "
            "start one, or use parallel.engine=auto"
        )
    if parallel.engine in _SHARES and config.method.name == "qlora":
        raise ConfigError(
            f"parallel.engine={parallel.engine} shares weights out, and 4-bit weights can't be; "
            "use parallel.engine=ddp for method.name=qlora"
        )
    if parallel.engine in _SHARES and config.optim.name == "adamw8bit":
        raise ConfigError(
            f"parallel.engine={parallel.engine} shares moments out, and 8-bit ones are in blocks "
            "of whole tensors; use optim.name=adamw, or parallel.engine=ddp"
        )
    if parallel.engine == "ddp" and world.world_size == 1:
        return parallel.model_copy(update={"engine": "single"})
    return parallel


def _first_that_fits(
    config: TrainConfig,
    model_config: Phi3VConfig,
    precision: Precision,
    world: World,
    device_bytes: int | None,
) -> ParallelConfig:
    wanted = config.parallel
    if wanted.offload_parameters:
        return ParallelConfig(engine="zero3", offload_optimizer=True, offload_parameters=True)
    if wanted.offload_optimizer:
        return ParallelConfig(engine="zero2", offload_optimizer=True)
    whole = ParallelConfig(engine="single" if world.world_size == 1 else "ddp")
    if device_bytes is None or config.method.has_adapters or config.optim.name == "adamw8bit":
        return whole
    choice = whole
    for choice in _from_fast_to_small(whole, world):
        assert choice.engine != "auto"
        memory = estimate_memory(
            config.model_copy(update={"parallel": choice}),
            model_config,
            world.world_size,
            engine=choice.engine,
            precision=precision,
        )
        if memory.total <= device_bytes:
            return choice
    return choice  # the smallest; the estimate leaves a margin


def _from_fast_to_small(whole: ParallelConfig, world: World) -> Iterator[ParallelConfig]:
    yield whole
    if world.world_size > 1:
        yield ParallelConfig(engine="fsdp2")
    yield ParallelConfig(engine="zero2", offload_optimizer=True)
    yield ParallelConfig(engine="zero3", offload_optimizer=True, offload_parameters=True)


def make_engine(
    parallel: ParallelConfig,
    training: TrainingModel,
    world: World,
    build_optimizer: BuildOptimizer,
    *,
    max_grad_norm: float,
) -> Engine:
    """The engine of a choice; the model's parameters become its own.

    Args:
        parallel: of `choose_engine`.
        training: of `prepare`.
        world: of `join_world`; all of its processes call this.
        build_optimizer: called with the parameters as the engine holds them.
        max_grad_norm: gradients are clipped to this global norm.
    """
    match parallel.engine:
        case "single" | "ddp":
            return ReplicatedEngine(training, world, build_optimizer, max_grad_norm=max_grad_norm)
        case "fsdp2":
            return ShardedEngine(
                training,
                world,
                build_optimizer,
                max_grad_norm=max_grad_norm,
                offload=parallel.offload_parameters,
            )
        case "zero1" | "zero2" | "zero3":
            # Loading DeepSpeed takes seconds.
            from phi3v_train.deepspeed_engine import DeepSpeedEngine

            return DeepSpeedEngine(
                training,
                world,
                build_optimizer,
                stage=int(parallel.engine[-1]),
                max_grad_norm=max_grad_norm,
                offload_optimizer=parallel.offload_optimizer,
                offload_parameters=parallel.offload_parameters,
            )
        case "auto":
            raise AssertionError("choose_engine comes first")


def describe_engine(parallel: ParallelConfig) -> str:
    """`zero2, optimizer in host memory`."""
    offloaded = [
        name
        for name, on in (
            ("parameters", parallel.offload_parameters),
            ("optimizer", parallel.offload_optimizer),
        )
        if on
    ]
    place = f", {' and '.join(offloaded)} in host memory" if offloaded else ""
    return parallel.engine + place
