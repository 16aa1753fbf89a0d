"""What a bug report needs, and what is wrong with this machine.

    facts = collect()              # versions, driver, GPUs, memory, disks, limits
    findings = examine(facts)      # what is wrong, each with the way out

    error    GPU: sm_70 (Tesla V100-SXM2-32GB) is not among this torch's ...
             the CUDA 12.6 builds of torch 2.11 to 2.14 are the last that do
    warning  /dev/shm: 0.1 GiB ...

An error is something that training can't run with; a warning makes it slow or may stop it; a note
is worth knowing.
"""

import importlib.metadata
import os
import platform
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from phi3v_train.gpus import OLDER_GPUS, OLDEST

GIB = 2**30

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """A GPU that torch sees."""

    name: str
    memory_gib: float
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Facts:
    """A machine, as far as training goes."""

    python: str
    platform: str
    cores: int
    """That this process may use."""
    memory_gib: float
    packages: dict[str, str]
    """Installed versions."""
    missing: tuple[str, ...]
    """Packages that phi3v-train needs and that are not installed."""
    torch_cuda: str | None
    """CUDA that torch is built for; None: a build without."""
    architectures: tuple[str, ...]
    """That this torch has kernels for: `sm_80`, or `compute_90` for later ones."""
    gpus: tuple[GpuFacts, ...]
    has_nvidia_device: bool
    """The kernel has an NVIDIA driver."""
    driver: str | None
    """Its version."""
    driver_cuda: str | None
    """The newest CUDA it can run."""
    shm_gib: float
    """Free in /dev/shm, through which workers hand over rows."""
    disk_gib: float
    """Free in the current folder."""
    open_files: int
    """Most a process may have open."""
    tools: dict[str, str | None] = field(default_factory=dict[str, str | None])
    """Paths of programs that DeepSpeed builds its ops with."""
    variables: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class Finding:
    """Something worth saying."""

    severity: Severity
    what: str
    way_out: str


# --- collecting -----------------------------------------------------------------------------------


def collect() -> Facts:
    """Look at this machine. Starts `nvidia-smi`, nothing else."""
    import torch

    from phi3v_train.env_report import environment

    record = environment()
    gpus: list[GpuFacts] = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            seen = torch.cuda.get_device_properties(index)
            size = seen.total_memory / GIB
            gpus.append(GpuFacts(seen.name, round(size, 1), (seen.major, seen.minor)))
    driver, driver_cuda = _driver()
    shm = Path("/dev/shm")
    return Facts(
        python=platform.python_version(),
        platform=platform.platform(),
        cores=record["cores"],
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        packages=record["packages"],
        missing=missing_packages(importlib.metadata.requires("phi3v-train") or ()),
        torch_cuda=torch.version.cuda,
        # asks no driver, so that it answers without one too
        architectures=tuple(torch.cuda.get_arch_list()),
        gpus=tuple(gpus),
        has_nvidia_device=Path("/proc/driver/nvidia/version").exists(),
        driver=driver,
        driver_cuda=driver_cuda,
        shm_gib=round(shutil.disk_usage(shm).free / GIB, 1) if shm.is_dir() else 0.0,
        disk_gib=round(shutil.disk_usage(Path.cwd()).free / GIB, 1),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        tools={name: shutil.which(name) for name in ("g++", "ninja", "nvcc")},
        variables=record["variables"],
    )


def _driver() -> tuple[str | None, str | None]:
    """Version of the NVIDIA driver and of the newest CUDA it can run, as nvidia-smi says them."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None, None
    try:
        said = subprocess.run(
            [program], capture_output=True, text=True, timeout=30, check=False
        ).stdout
    except subprocess.TimeoutExpired:
        return None, None
    return read_nvidia_smi(said)


def read_nvidia_smi(said: str) -> tuple[str | None, str | None]:
    """(driver version, CUDA version) in the head of nvidia-smi's table; None: not there."""
    driver = re.search(r"Driver Version:\s*([\d.]+)", said)
    cuda = re.search(r"CUDA (?:UMD )?Version:\s*([\d.]+)", said)
    return driver and driver[1], cuda and cuda[1]


def missing_packages(requirements: Sequence[str]) -> tuple[str, ...]:
    """Names in a package's requirements that are not installed; extras are not asked for."""
    missing: list[str] = []
    for requirement in requirements:
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        if name is None or "extra ==" in requirement:
            continue
        try:
            importlib.metadata.version(name[0])
        except importlib.metadata.PackageNotFoundError:
            missing.append(name[0])
    return tuple(missing)


# --- examining ------------------------------------------------------------------------------------


def examine(facts: Facts) -> list[Finding]:
    """What is wrong, errors first.

    Args:
        facts: of `collect`.
    """
    order: dict[Severity, int] = {"error": 0, "warning": 1, "note": 2}
    found = [finding for rule in RULES for finding in rule(facts)]
    return sorted(found, key=lambda finding: order[finding.severity])


def _packages(facts: Facts) -> Iterator[Finding]:
    if facts.missing:
        yield Finding(
            "error",
            f"not installed: {', '.join(facts.missing)}",
            "install phi3v-train again, with its dependencies",
        )


def _driver_and_wheel(facts: Facts) -> Iterator[Finding]:
    has_driver = facts.has_nvidia_device or facts.driver is not None
    if facts.gpus or not has_driver:
        return
    if facts.torch_cuda is None:
        yield Finding(
            "error",
            "there is an NVIDIA driver, but this torch is a build without CUDA",
            "install torch from its default index, or from that of your CUDA version",
        )
    elif facts.driver_cuda is not None and _version(facts.driver_cuda) < _oldest(facts.torch_cuda):
        yield Finding(
            "error",
            f"driver {facts.driver} runs CUDA up to {facts.driver_cuda}, and this torch is built "
            f"for {facts.torch_cuda}",
            "update the driver, or install a torch that is built for the driver's CUDA",
        )
    else:
        yield Finding(
            "error",
            "there is an NVIDIA driver, but torch sees no GPU",
            "check nvidia-smi, CUDA_VISIBLE_DEVICES "
            f"(now {facts.variables.get('CUDA_VISIBLE_DEVICES', 'not set')}) and, in a container, "
            "that it was started with its GPUs",
        )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _oldest(torch_cuda: str) -> tuple[int, ...]:
    """Drivers run any minor version of the major one they know."""
    return (_version(torch_cuda)[0],)


def _architecture(facts: Facts) -> Iterator[Finding]:
    for gpu in sorted(set(facts.gpus), key=lambda gpu: gpu.name):
        if not has_kernels(gpu.capability, facts.architectures):
            version = facts.packages.get("torch", "this torch")
            yield Finding(
                "error",
                f"{gpu.name} is sm_{gpu.capability[0]}{gpu.capability[1]}, and torch {version} has "
                f"kernels for {', '.join(facts.architectures) or 'no GPU'} only",
                f"install another build of torch; {OLDER_GPUS}"
                if gpu.capability < OLDEST
                else "install a newer torch",
            )
        elif gpu.capability < (8, 0):
            yield Finding(
                "note",
                f"{gpu.name} has no bf16 and no flash attention in torch",
                "precision=auto takes fp16 there; expect a third of an A100's speed",
            )


def has_kernels(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether a torch built for `architectures` runs on a GPU.

    Code for sm_80 runs on sm_86 (same major version, later minor one); what is kept as
    `compute_90` is compiled on the spot for everything later. Suffixes (sm_90a) bind to one GPU.
    """
    for name in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
        if match is None:
            continue
        built = int(match[2]), int(match[3])
        if match[4]:
            if built == capability:
                return True
        elif match[1] == "compute":
            if built <= capability:
                return True
        elif built[0] == capability[0] and built[1] <= capability[1]:
            return True
    return False


def _several_kinds(facts: Facts) -> Iterator[Finding]:
    kinds = {gpu.name for gpu in facts.gpus}
    if len(kinds) > 1:
        yield Finding(
            "warning",
            f"GPUs of {len(kinds)} kinds: {', '.join(sorted(kinds))}",
            "the slowest sets the pace; choose equal ones with CUDA_VISIBLE_DEVICES",
        )


def _no_gpu(facts: Facts) -> Iterator[Finding]:
    if not facts.gpus and not facts.has_nvidia_device and facts.driver is None:
        yield Finding(
            "note",
            "no NVIDIA driver: this machine trains on its CPU",
            "enough for `phi3v-train init tiny` and the tests; estimate says what GPU to rent",
        )


def _shared_memory(facts: Facts) -> Iterator[Finding]:
    wanted = 0.5 * max(1, len(facts.gpus))
    if facts.shm_gib < wanted:
        yield Finding(
            "warning",
            f"/dev/shm has {facts.shm_gib} GiB free, and workers keep up to 0.5 GiB of rows a GPU",
            "in a container: --shm-size=16g or --ipc=host; or lower data.prefetch_mib",
        )


def _disk(facts: Facts) -> Iterator[Finding]:
    if facts.disk_gib < 160:
        yield Finding(
            "warning" if facts.disk_gib < 20 else "note",
            f"{facts.disk_gib} GiB free in the current folder",
            "a checkpoint of full training takes 50 GB, of adapters 3, and with checkpoint.keep=2 "
            "there are up to three; set output_dir to a larger disk",
        )


def _limits(facts: Facts) -> Iterator[Finding]:
    if facts.open_files < 1024:
        yield Finding(
            "warning",
            f"a process may have {facts.open_files} files open",
            "raise it: ulimit -n 65536",
        )


def _cores(facts: Facts) -> Iterator[Finding]:
    if facts.gpus and facts.cores < 3 * len(facts.gpus):
        yield Finding(
            "warning",
            f"{facts.cores} cores for {len(facts.gpus)} GPUs: decoding may not keep up",
            "give the job more cores (data.num_workers=2 a GPU wants 3), or data.resize=fast",
        )


def _build_tools(facts: Facts) -> Iterator[Finding]:
    absent = [name for name in ("g++", "ninja") if facts.tools.get(name) is None]
    if absent:
        yield Finding(
            "note",
            f"{' and '.join(absent)} not found: DeepSpeed can't build its Adam for the host",
            "install what is missing where you use parallel.offload_optimizer",
        )


Rule = Callable[[Facts], Iterator[Finding]]

RULES: tuple[Rule, ...] = (
    _packages,
    _driver_and_wheel,
    _architecture,
    _several_kinds,
    _no_gpu,
    _shared_memory,
    _disk,
    _limits,
    _cores,
    _build_tools,
)


# --- printing -------------------------------------------------------------------------------------


def print_diagnosis(facts: Facts, findings: Sequence[Finding], console: Console) -> None:
    """Show facts, to be copied into a report, and findings."""
    gpus = [
        f"{gpu.name}, {gpu.memory_gib} GiB, sm_{gpu.capability[0]}{gpu.capability[1]}"
        for gpu in facts.gpus
    ]
    driver = f"{facts.driver} (CUDA up to {facts.driver_cuda})" if facts.driver else "none"
    rows = {
        "python": facts.python,
        "platform": facts.platform,
        "cores, memory": f"{facts.cores}, {facts.memory_gib} GiB",
        "driver": driver,
        "torch's CUDA": facts.torch_cuda or "none",
        "built for": ", ".join(facts.architectures) or "no GPU",
        "GPUs": "; ".join(gpus) or "none",
        "/dev/shm": f"{facts.shm_gib} GiB free",
        "disk here": f"{facts.disk_gib} GiB free",
        "open files": str(facts.open_files),
        "packages": ", ".join(f"{name} {version}" for name, version in facts.packages.items()),
        "tools": ", ".join(f"{name}: {path or 'none'}" for name, path in facts.tools.items()),
        "variables": ", ".join(f"{name}={value}" for name, value in facts.variables.items())
        or "none that change how torch runs",
    }
    console.print(_labelled([(Text(name), Text(value)) for name, value in rows.items()]))
    console.print()
    colours: dict[Severity, str] = {"error": "red", "warning": "yellow", "note": "cyan"}
    lines: list[tuple[Text, Text]] = []
    for finding in findings:
        label = Text(finding.severity, style=colours[finding.severity])
        lines += [(label, Text(finding.what)), (Text(), Text(finding.way_out, style="dim"))]
    console.print(_labelled(lines))
    if not any(finding.severity == "error" for finding in findings):
        console.print(Text("nothing here stops training"))


def _labelled(lines: Sequence[tuple[Text, Text]]) -> Table:
    """Two columns; what is too long for the second goes on below itself."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for line in lines:
        table.add_row(*line)
    return table
