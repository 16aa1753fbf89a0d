"""GPUs and rented machines by name: what `estimate` knows of hardware.

    find_gpu("a100-80g").memory_gib           # 79.2, as torch says it
    find_machine("Standard_ND40rs_v2")        # 8 x v100-32g, 672 GiB, 12.5 GB/s between machines

Memory is what torch reports as total, which is a little less than the name says. Memory and link
bandwidths are of NVIDIA's data sheets; `bus_gb_s` is what one GPU gets of it in a collective among
the GPUs of its machine: for NVLink about three quarters of one direction, and for PCIe 5.0, 4.0
and 3.0 some 25, 12 and 8 GB/s. `efficiency` is an assumption: the share of the peak that training
reaches while it computes, until `phi3v-train bench` has measured it.

Peaks are in `phi3v_train.peaks`. Machines: Azure's pages of sizes at
https://learn.microsoft.com/azure/virtual-machines/sizes/overview#gpu-accelerated
(ND A100 v4, NDm A100 v4, ND H100 v5, ND H200 v5, NDv2, NC A100 v4, NCads H100 v5, NCasT4 v3,
NVadsA10 v5).
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from phi3v_train.peaks import peak_flops

Kind = Literal["data centre", "workstation", "consumer"]


@dataclass(frozen=True, slots=True)
class Gpu:
    """One kind of GPU."""

    key: str
    """What `--gpu` takes."""

    name: str
    """As the driver says it."""

    kind: Kind
    memory_gib: float
    capability: tuple[int, int]
    """Compute capability: (8, 0) is sm_80."""

    memory_gb_s: float
    bus_gb_s: float
    """To the other GPUs of its machine, one direction, in a collective."""

    efficiency: float
    """Assumed share of the peak, 0 to 1."""

    @property
    def architecture(self) -> str:
        """As wheels list it: `sm_80`."""
        return f"sm_{self.capability[0]}{self.capability[1]}"

    @property
    def has_bf16(self) -> bool:
        """Ampere and later."""
        return self.capability >= (8, 0)

    @property
    def has_varlen(self) -> bool:
        """Whether packed rows get torch's flash attention; without, one sample at a time."""
        return self.capability >= (8, 0)

    @property
    def precision(self) -> Literal["bf16", "fp16"]:
        """What `precision=auto` means on it."""
        return "bf16" if self.has_bf16 else "fp16"

    @property
    def peak(self) -> float:
        """Operations a second in that precision."""
        peak = peak_flops(self.name, self.precision)
        assert peak is not None, self.name
        return peak


OLDEST = (7, 5)
"""Compute capability of the oldest GPUs that torch's default wheels have kernels for."""

OLDER_GPUS = "the CUDA 12.6 builds of torch 2.11 to 2.14 are the last that do"
"""https://github.com/pytorch/pytorch/issues/190385; CUDA 13 can't build them."""

GPUS = (
    Gpu("h200", "NVIDIA H200", "data centre", 139.8, (9, 0), 4800, 340, 0.40),
    Gpu("h100-80g", "NVIDIA H100 80GB HBM3", "data centre", 79.1, (9, 0), 3350, 340, 0.40),
    Gpu("h100-nvl", "NVIDIA H100 NVL", "data centre", 93.1, (9, 0), 3900, 25, 0.40),
    Gpu("a100-80g", "NVIDIA A100-SXM4-80GB", "data centre", 79.2, (8, 0), 2039, 225, 0.50),
    Gpu("a100-40g", "NVIDIA A100-SXM4-40GB", "data centre", 39.4, (8, 0), 1555, 225, 0.50),
    Gpu("a100-80g-pcie", "NVIDIA A100 80GB PCIe", "data centre", 79.2, (8, 0), 1935, 12, 0.50),
    Gpu("v100-32g", "Tesla V100-SXM2-32GB", "data centre", 31.7, (7, 0), 900, 110, 0.30),
    Gpu("v100-16g", "Tesla V100-SXM2-16GB", "data centre", 15.8, (7, 0), 900, 110, 0.30),
    Gpu("l40s", "NVIDIA L40S", "data centre", 44.4, (8, 9), 864, 12, 0.40),
    Gpu("l4", "NVIDIA L4", "data centre", 22.0, (8, 9), 300, 12, 0.40),
    Gpu("a10", "NVIDIA A10", "data centre", 22.0, (8, 6), 600, 12, 0.45),
    Gpu("t4", "Tesla T4", "data centre", 14.6, (7, 5), 320, 8, 0.30),
    Gpu("rtx-8000", "Quadro RTX 8000", "workstation", 47.5, (7, 5), 672, 8, 0.30),
    Gpu("rtx-a6000", "NVIDIA RTX A6000", "workstation", 47.5, (8, 6), 768, 12, 0.45),
    Gpu("rtx-5090", "NVIDIA GeForce RTX 5090", "consumer", 31.4, (12, 0), 1792, 12, 0.45),
    Gpu("rtx-4090", "NVIDIA GeForce RTX 4090", "consumer", 23.5, (8, 9), 1008, 12, 0.45),
    Gpu("rtx-3090", "NVIDIA GeForce RTX 3090", "consumer", 23.6, (8, 6), 936, 12, 0.45),
)


@dataclass(frozen=True, slots=True)
class Machine:
    """A size that can be rented."""

    name: str
    gpu: str
    """Key of its GPUs."""
    num_gpus: int
    host_gib: float
    network_gb_s: float
    """To other machines, of all its GPUs together."""


MACHINES = (
    Machine("Standard_ND96isr_H200_v5", "h200", 8, 1850, 400),
    Machine("Standard_ND96isr_H100_v5", "h100-80g", 8, 1900, 400),
    Machine("Standard_ND96amsr_A100_v4", "a100-80g", 8, 1800, 200),
    Machine("Standard_ND96asr_v4", "a100-40g", 8, 900, 200),
    Machine("Standard_ND40rs_v2", "v100-32g", 8, 672, 12.5),
    Machine("Standard_NC40ads_H100_v5", "h100-nvl", 1, 320, 5),
    Machine("Standard_NC80adis_H100_v5", "h100-nvl", 2, 640, 10),
    Machine("Standard_NC24ads_A100_v4", "a100-80g-pcie", 1, 220, 2.5),
    Machine("Standard_NC48ads_A100_v4", "a100-80g-pcie", 2, 440, 5),
    Machine("Standard_NC96ads_A100_v4", "a100-80g-pcie", 4, 880, 10),
    Machine("Standard_NV36ads_A10_v5", "a10", 1, 440, 5),
    Machine("Standard_NV72ads_A10_v5", "a10", 2, 880, 10),
    Machine("Standard_NC4as_T4_v3", "t4", 1, 28, 1),
    Machine("Standard_NC64as_T4_v3", "t4", 4, 440, 4),
)
"""Of Azure. The retired NCv3 (V100) is left out; NVads A10 sizes with a part of a GPU too."""


def find_gpu(key: str) -> Gpu:
    """A GPU by its key, upper and lower case alike.

    Raises:
        ValueError: none of that name; the message lists those there are.
    """
    known = {gpu.key: gpu for gpu in GPUS}
    if key.lower() not in known:
        raise ValueError(_unknown("GPU", key, known))
    return known[key.lower()]


def find_machine(name: str) -> Machine:
    """A size by its name, upper and lower case alike, with or without `Standard_`.

    Raises:
        ValueError: none of that name; the message lists those there are.
    """
    known = {machine.name.lower(): machine for machine in MACHINES}
    for candidate in (name.lower(), f"standard_{name.lower()}"):
        if candidate in known:
            return known[candidate]
    raise ValueError(_unknown("size", name, (m.name for m in MACHINES)))


def gpu_of_device(device_name: str, memory_bytes: int) -> Gpu | None:
    """The GPU that a driver's name and memory stand for; None: one not in the table."""
    near = [
        gpu
        for gpu in GPUS
        if gpu.name == device_name and abs(gpu.memory_gib - memory_bytes / 2**30) < 4
    ]
    return near[0] if near else None


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"no {what} named {name!r}: {hint}known are {', '.join(names)}"
