"""Which method on which machine: what fits, how fast it is, and what to run.

    hardware = Hardware(find_gpu("a100-80g"), num_gpus=8, gpus_per_machine=8)
    options = weigh(config, Phi3VConfig(), hardware, workload)
    advice = recommend(options, hardware)
    advice.option.method, advice.option.engine     # "full", "fsdp2"
    advice.reasons                                 # in words

As the cookbook's guide has it: GPUs of a data centre fine-tune all weights, in bf16 with flash
attention where there is one (V100: fp16 without); others train adapters, 4-bit ones where the plain
ones don't fit. An option is a method under an engine in the fastest setting that fits: rows as long
as the configuration's or half, a quarter ... of that, activations kept or computed again; or in the
configuration's own setting, where that is what was asked.
"""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from phi3v_train.config import LoraConfig, MethodConfig, ParallelConfig, TrainConfig
from phi3v_train.configuration_phi3_v import Phi3VConfig
from phi3v_train.estimate import (
    GIB,
    EngineName,
    Hardware,
    Memory,
    Speed,
    estimate_memory,
    estimate_speed,
)
from phi3v_train.gpus import OLDER_GPUS, OLDEST
from phi3v_train.workload import Workload

Fit = Literal["yes", "tight", "no"]

TIGHT = 0.92
"""Of a GPU's memory: an estimate above it may be wrong by what is left."""


@dataclass(frozen=True, slots=True)
class Option:
    """A method under an engine, in the setting that suits the GPU best."""

    method: str
    """In words: `full`, `frozen vision`, `lora`, `lora, frozen vision`, `qlora`."""
    engine: EngineName
    offload: str
    """`none`, `optimizer` or `all`: what is kept in host memory."""
    gradient_checkpointing: bool
    max_tokens_per_row: int
    memory: Memory
    speed: Speed
    fit: Fit
    """On the GPU, with what is offloaded in host memory where its size is known."""

    @property
    def fits(self) -> bool:
        """Tightly or not."""
        return self.fit != "no"

    @property
    def memory_gib(self) -> float:
        """On each GPU."""
        return self.memory.total / GIB

    @property
    def overrides(self) -> tuple[str, ...]:
        """What makes a configuration this option."""
        words = [*METHODS[self.method][1], f"parallel.engine={self.engine}"]
        if self.offload != "none":
            words.append("parallel.offload_optimizer=true")
        if self.offload == "all":
            words.append("parallel.offload_parameters=true")
        words.append(f"data.max_tokens_per_row={self.max_tokens_per_row}")
        if self.gradient_checkpointing:
            words.append("method.gradient_checkpointing=true")
        return tuple(words)


@dataclass(frozen=True, slots=True)
class Advice:
    """What to do, or why nothing can be done."""

    option: Option | None
    """None: nothing fits."""
    reasons: tuple[str, ...]


def _methods(config: TrainConfig) -> dict[str, MethodConfig]:
    lora = LoraConfig(
        rank=config.method.lora.rank,
        alpha=config.method.lora.alpha,
        alpha_ratio=config.method.lora.alpha_ratio,
    )
    return {
        "full": MethodConfig(),
        "frozen vision": MethodConfig(freeze=("vision",)),
        "lora": MethodConfig(name="lora", lora=lora),
        "lora, frozen vision": MethodConfig(name="lora", freeze=("vision",), lora=lora),
        "qlora": MethodConfig(name="qlora", lora=lora),
    }


METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "full": ("all weights", ("method.name=full",)),
    "frozen vision": ("all weights but CLIP's", ("method.name=full", "method.freeze=[vision]")),
    "lora": ("adapters on all parts", ("method.name=lora",)),
    "lora, frozen vision": (
        "adapters, none on CLIP",
        ("method.name=lora", "method.freeze=[vision]"),
    ),
    "qlora": ("adapters, decoder in 4 bits", ("method.name=qlora",)),
}
"""Name of a method: what trains, and the overrides that choose it."""


def weigh(
    config: TrainConfig,
    model_config: Phi3VConfig,
    hardware: Hardware,
    workload: Workload,
    *,
    efficiency: float | None = None,
    as_is: bool = False,
) -> list[Option]:
    """Every method under every engine that makes sense on some GPUs.

    Args:
        config: what isn't method, engine, row length or recomputing counts as it is.
        model_config: sizes of the model.
        hardware: the GPUs.
        workload: what is trained on.
        efficiency: share of the peak; none: the GPU's assumed one.
        as_is: rows and recomputing only as the configuration has them.
    """
    rows = _row_lengths(config, workload)
    recomputing = (False, True)
    if as_is:
        rows, recomputing = rows[:1], (config.method.gradient_checkpointing,)
    options: list[Option] = []
    for name, method in _methods(config).items():
        for engine, offload in _engines(method, hardware, config):
            settings = [
                _option(config, model_config, hardware, workload, name, method, engine, offload,
                        recompute, row, efficiency)
                for row in rows
                for recompute in recomputing
            ]  # fmt: skip
            fitting = [option for option in settings if option.fits]
            if fitting:
                best = max(_surest(fitting), key=_speed)
            else:
                best = min(settings, key=lambda o: o.memory.total)
            options.append(best)
    return options


def _engines(
    method: MethodConfig, hardware: Hardware, config: TrainConfig
) -> Iterator[tuple[EngineName, str]]:
    several = hardware.num_gpus > 1
    if method.has_adapters:
        yield ("ddp" if several else "single"), "none"
        return
    yield ("ddp" if several else "single"), "none"
    if config.optim.name != "adamw":
        return  # 8-bit moments can't be shared out
    if several:
        yield "fsdp2", "none"
        yield "zero2", "none"
        yield "zero3", "none"
    yield "zero2", "optimizer"
    yield "zero3", "all"


def _row_lengths(config: TrainConfig, workload: Workload) -> list[int]:
    lengths = [config.data.max_tokens_per_row]
    while lengths[-1] // 2 >= workload.longest:
        lengths.append(lengths[-1] // 2)
    return lengths


def _option(
    config: TrainConfig,
    model_config: Phi3VConfig,
    hardware: Hardware,
    workload: Workload,
    name: str,
    method: MethodConfig,
    engine: EngineName,
    offload: str,
    recompute: bool,
    row: int,
    efficiency: float | None,
) -> Option:
    data = config.data.model_copy(update={"max_tokens_per_row": row})
    setting = config.model_copy(
        update={
            "method": method.model_copy(update={"gradient_checkpointing": recompute}),
            "data": data,
            "parallel": ParallelConfig(
                engine=engine,
                offload_optimizer=offload != "none",
                offload_parameters=offload == "all",
            ),
        }
    )
    gpu = hardware.gpu
    share = workload.row.num_tokens / config.data.max_tokens_per_row  # a row is seldom quite full
    in_rows = workload.with_row(max(1, round(row * min(1.0, share))))
    memory = estimate_memory(
        setting,
        model_config,
        hardware.num_gpus,
        engine=engine,
        precision=gpu.precision,
        workload=in_rows,
        has_varlen=gpu.has_varlen,
    )
    speed = estimate_speed(
        setting, model_config, hardware, in_rows, engine=engine, efficiency=efficiency
    )
    return Option(
        method=name,
        engine=engine,
        offload=offload,
        gradient_checkpointing=recompute,
        max_tokens_per_row=row,
        memory=memory,
        speed=speed,
        fit=_fit(memory, hardware),
    )


def _fit(memory: Memory, hardware: Hardware) -> Fit:
    here = min(hardware.num_gpus, hardware.gpus_per_machine)
    host = hardware.host_gib
    if host is not None and memory.host * here > 0.8 * host * GIB:
        return "no"
    share = memory.total / (hardware.gpu.memory_gib * GIB)
    return "no" if share > 1 else "tight" if share > TIGHT else "yes"


def recommend(options: Sequence[Option], hardware: Hardware) -> Advice:
    """Choose among the options, as the cookbook's guide does.

    Args:
        options: of `weigh`.
        hardware: the same GPUs.
    """
    gpu = hardware.gpu
    reasons = list(_words_on(gpu.architecture, hardware))
    order = ("full", "lora", "qlora") if gpu.kind == "data centre" else ("lora", "qlora")
    for method in order:
        # the host's memory is slow: only where nothing else fits
        fitting = [o for o in options if o.method == method and o.fits]
        near = [o for o in fitting if o.offload == "none"]
        if method == "full" and not near:
            slow = ", only with the optimizer in host memory" if fitting else ""
            least = min(o.memory_gib for o in options if o.method == "full" and o.offload == "none")
            reasons.append(
                f"full fine-tuning does not fit{slow}: it needs {least:.0f} GiB a GPU, and there "
                f"are {gpu.memory_gib:.0f}"
            )
            continue
        if near:
            best = max(_surest(near), key=_speed)
            reasons.append(f"{METHODS[method][0]} in {best.memory_gib:.0f} GiB")
            return Advice(best, tuple(reasons))
        if method == "lora":
            reasons.append("adapters over 16-bit weights do not fit")
    reasons.append("nothing fits: lower data.num_crops, or take GPUs with more memory")
    return Advice(None, tuple(reasons))


def _surest(fitting: list[Option]) -> list[Option]:
    """Those that fit easily, if there are any."""
    return [option for option in fitting if option.fit == "yes"] or fitting


def _speed(option: Option) -> tuple[float, int]:
    return option.speed.images_per_second, option.max_tokens_per_row


def _words_on(architecture: str, hardware: Hardware) -> Iterator[str]:
    gpu = hardware.gpu
    if gpu.kind != "data centre":
        yield f"{gpu.name} is no GPU of a data centre: adapters instead of all weights"
    elif gpu.has_bf16:
        yield "a data-centre GPU with bf16 and flash attention: all weights, if they fit"
    else:
        yield "fp16 without flash attention: slower, and a little less accurate than bf16"
    if gpu.capability < OLDEST:
        yield f"torch's default wheels have no kernels for {architecture}: {OLDER_GPUS}"


def command(
    option: Option, hardware: Hardware, config_path: str | None, overrides: Sequence[str]
) -> str:
    """The command line that trains as an option says.

    Args:
        option: chosen.
        hardware: its GPUs.
        config_path: of the configuration the estimate was made for.
        overrides: on top of it; those that the option decides itself give way.
    """
    decided = {word.partition("=")[0] for word in option.overrides} | {
        "method.name",
        "method.freeze",
        "method.gradient_checkpointing",
    }
    kept = [word for word in overrides if word.partition("=")[0] not in decided]
    given = {word.partition("=")[0] for word in kept}
    if config_path is None:
        wanted = {"model": "MODEL", "output_dir": "RUN", "data.train": "SHARDS"}
        kept += [f"{key}={value}" for key, value in wanted.items() if key not in given]
    words = ["phi3v-train", "launch", *([config_path] if config_path else []), *kept]
    words += option.overrides
    here = min(hardware.num_gpus, hardware.gpus_per_machine)
    if hardware.num_gpus > here:
        # the same on every machine but for its number
        words += ["--nnodes", str(hardware.num_gpus // here)]
        words += ["--node_rank", "NODE", "--rdzv_endpoint", "HOST:PORT"]
    if here > 1:
        words += ["--nproc", str(here)]
    return shlex.join(words)
