"""What `phi3v-train estimate` says: a table of options and a recommendation.

    report = make_report(None, ["train.global_batch_size=64"], sku="Standard_ND96asr_v4")
    print_report(report)
    report.as_json()

Model and data are those of the configuration where they are there; what isn't is replaced by the
sizes of Phi-3.5-vision and by pages of documents, and the report says so.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from phi3v_train.advice import METHODS, Advice, Option, command, recommend, weigh
from phi3v_train.config import TrainConfig, load_config
from phi3v_train.configuration_phi3_v import Phi3VConfig
from phi3v_train.estimate import GIB, Hardware, rows_per_step
from phi3v_train.gpus import find_gpu, find_machine
from phi3v_train.workload import Workload, default_workload, measure_workload

WIDE = 110
"""Columns of a terminal from which on the parts of the memory are shown too."""

_PLACES = ("model", "output_dir", "data.train")


@dataclass(frozen=True, slots=True)
class EstimateReport:
    """An estimate for some hardware."""

    hardware: Hardware
    efficiency: float
    model: str
    workload: Workload
    options: list[Option]
    advice: Advice
    command: str | None
    """Of the recommended option."""
    rows_per_step: int
    """On each GPU, in the configuration's setting."""
    global_batch_size: int

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON would have it; bytes as whole numbers."""
        return {
            "hardware": asdict(self.hardware),
            "efficiency": self.efficiency,
            "model": self.model,
            "workload": asdict(self.workload),
            "options": [_as_json(option) for option in self.options],
            "recommended": None if self.advice.option is None else _as_json(self.advice.option),
            "reasons": list(self.advice.reasons),
            "command": self.command,
        }


def _as_json(option: Option) -> dict[str, Any]:
    record = asdict(option)
    record["memory"]["total"] = option.memory.total
    return {**record, "overrides": list(option.overrides)}


def make_report(
    config_path: str | None,
    overrides: Sequence[str],
    *,
    gpu: str | None = None,
    sku: str | None = None,
    num_gpus: int | None = None,
    num_machines: int = 1,
    efficiency: float | None = None,
    as_is: bool = False,
) -> EstimateReport:
    """Estimate a configuration on named hardware.

    Args:
        config_path: YAML file; none: the overrides alone, which need name no model and no data.
        overrides: `dotted.key=value` each.
        gpu: key of a GPU.
        sku: a machine's name, instead of a GPU's.
        num_gpus: in a machine; none: 1, or what the machine has.
        num_machines: of that kind.
        efficiency: share of the peak while computing; none: the GPU's assumed one.
        as_is: rows and recomputing only as the configuration has them.

    Raises:
        ValueError: a configuration that can't be used, or hardware that isn't known.
    """
    hardware = choose_hardware(gpu, sku, num_gpus, num_machines)
    config = load_without_places(config_path, overrides)
    if (config.model / "config.json").is_file():
        from phi3v_train.methods import read_model_config

        model_config, model = read_model_config(config.model), str(config.model)
    else:
        named = any(word.startswith("model=") for word in overrides) or config_path is not None
        absent = f"; {config.model} has no config.json" if named else ""
        model_config, model = Phi3VConfig(), f"the sizes of Phi-3.5-vision{absent}"
    workload = _workload(config, hardware.num_gpus)
    options = weigh(config, model_config, hardware, workload, efficiency=efficiency, as_is=as_is)
    advice = recommend(options, hardware)
    best = advice.option
    return EstimateReport(
        hardware=hardware,
        efficiency=efficiency or hardware.gpu.efficiency,
        model=model,
        workload=workload,
        options=options,
        advice=advice,
        command=None if best is None else command(best, hardware, config_path, overrides),
        rows_per_step=rows_per_step(config, workload, hardware.num_gpus),
        global_batch_size=config.train.global_batch_size,
    )


def choose_hardware(
    gpu: str | None, sku: str | None, num_gpus: int | None, num_machines: int
) -> Hardware:
    """The hardware that a command line names.

    Raises:
        ValueError: both or neither of `gpu` and `sku`, or a name that isn't known.
    """
    if (gpu is None) == (sku is None):
        raise ValueError(
            "name the hardware by one of --gpu (for example a100-80g) and --sku (for example "
            "Standard_ND96asr_v4)"
        )
    if gpu is not None:
        count = num_gpus or 1
        return Hardware(find_gpu(gpu), count * num_machines, count)
    assert sku is not None
    machine = find_machine(sku)
    count = num_gpus or machine.num_gpus
    if count > machine.num_gpus:
        raise ValueError(
            f"{machine.name} has {machine.num_gpus} GPUs, got --num_gpus {count}; --num_machines "
            "takes more machines"
        )
    return Hardware(
        find_gpu(machine.gpu), count * num_machines, count, machine.network_gb_s, machine.host_gib
    )


def load_without_places(config_path: str | None, overrides: Sequence[str]) -> TrainConfig:
    """A configuration whose model, data and output folder need not be set, without a file.

    Raises:
        ConfigError: as `load_config`.
    """
    given = {override.partition("=")[0] for override in overrides}
    missing = [key for key in _PLACES if key not in given and config_path is None]
    return load_config(config_path, [*(f"{key}={key}" for key in missing), *overrides])


def _workload(config: TrainConfig, world_size: int) -> Workload:
    has_tokenizer = (config.model / "tokenizer.json").is_file()
    places = [source.path for source in config.data.train]
    absent = [str(p) for p in places if isinstance(p, Path) and not p.exists()]
    if has_tokenizer and not absent:
        return measure_workload(config, world_size)
    return default_workload(config.data.max_tokens_per_row)


# --- printing -------------------------------------------------------------------------------------


def print_report(report: EstimateReport, console: Console) -> None:
    """Show the table and what follows from it."""
    hardware, gpu = report.hardware, report.hardware.gpu
    where = f"{hardware.num_gpus} x {gpu.name}"
    if hardware.num_gpus > hardware.gpus_per_machine:
        where += f" in {hardware.num_gpus // hardware.gpus_per_machine} machines"
    console.print(Text(f"{where}, {gpu.memory_gib:.1f} GiB each, {gpu.precision}"))
    console.print(Text(f"model  {report.model}"))
    console.print(Text(f"data   {report.workload.source}"))
    console.print(
        Text(
            f"batch  {report.global_batch_size} samples a step; assumed {report.efficiency:.0%} of "
            f"{gpu.peak / 1e12:.0f} TFLOP/s while computing"
        )
    )
    console.print()
    is_wide = console.width >= WIDE
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("method", "engine", "row", "recompute" if is_wide else "again"):
        table.add_column(name)
    for name in ("state", "activ.", "other", "GiB/GPU") if is_wide else ("GiB",):
        table.add_column(name, justify="right")
    table.add_column("fits")
    table.add_column("images/s" if is_wide else "img/s", justify="right")
    table.add_column("MFU", justify="right")
    for option in report.options:
        style = "bold" if option == report.advice.option else None
        table.add_row(*_cells(option, is_wide=is_wide), style=style)
    console.print(table)
    console.print()
    for reason in report.advice.reasons:
        console.print(Text(f"- {reason}"), soft_wrap=True)
    best = report.advice.option
    if best is not None and report.command is not None:
        console.print(Text(f"\nrecommended: {best.method}, {METHODS[best.method][0]}"))
        console.print(Text(f"  {report.command}"), soft_wrap=True)


def _cells(option: Option, *, is_wide: bool) -> list[str]:
    memory = option.memory
    state = memory.weights + memory.gradients + memory.optimizer
    other = memory.working + memory.logits + memory.margin
    engine = (
        option.engine + {"none": "", "optimizer": " + host", "all": " + host, all"}[option.offload]
    )
    speed = option.speed
    sizes = (state, memory.activations, other, memory.total) if is_wide else (memory.total,)
    return [
        option.method,
        engine,
        f"{option.max_tokens_per_row:,}",
        "yes" if option.gradient_checkpointing else "no",
        *(f"{size / GIB:.1f}" for size in sizes),
        option.fit,
        f"{speed.images_per_second:.1f}" if option.fits else "-",
        f"{speed.mfu:.0%}" if option.fits else "-",
    ]
