import json
from dataclasses import replace

import pytest
from click.testing import CliRunner
from phi3v_train.cli import main
from phi3v_train.doctor import (
    Facts,
    GpuFacts,
    examine,
    has_kernels,
    missing_packages,
    read_nvidia_smi,
)

DEFAULT_WHEEL = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
A100 = GpuFacts("NVIDIA A100-SXM4-80GB", 79.2, (8, 0))
V100 = GpuFacts("Tesla V100-SXM2-32GB", 31.7, (7, 0))

HEALTHY = Facts(
    python="3.12.1",
    platform="Linux",
    cores=64,
    memory_gib=900.0,
    packages={"torch": "2.15.0"},
    missing=(),
    torch_cuda="13.2",
    architectures=DEFAULT_WHEEL,
    gpus=(A100,) * 8,
    has_nvidia_device=True,
    driver="580.10",
    driver_cuda="13.2",
    shm_gib=400.0,
    disk_gib=2000.0,
    open_files=65536,
    tools={"g++": "/usr/bin/g++", "ninja": "/usr/bin/ninja"},
)


def of_severity(severity, **changes):
    found = examine(replace(HEALTHY, **changes))
    return [finding for finding in found if finding.severity == severity]


def test_a_healthy_machine_has_no_findings():
    assert examine(HEALTHY) == []


def test_a_v100_is_told_that_the_default_wheel_has_no_kernels_for_it():
    (error,) = of_severity("error", gpus=(V100,) * 8)
    assert "sm_70, and torch 2.15.0 has kernels for sm_75, sm_80" in error.what
    assert "CUDA 12.6 builds of torch 2.11 to 2.14" in error.way_out
    older = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
    assert of_severity("error", gpus=(V100,), architectures=older) == []
    (note,) = of_severity("note", gpus=(V100,), architectures=older)
    assert "no bf16" in note.what


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 0), ("sm_80",), True),
        ((8, 9), ("sm_80",), True),  # a later minor version of the same major one
        ((8, 0), ("sm_86",), False),
        ((9, 0), ("sm_80",), False),
        ((12, 0), ("sm_90", "compute_90"), True),  # compiled on the spot
        ((8, 6), ("compute_90",), False),
        ((9, 0), ("sm_90a",), True),
        ((10, 0), ("sm_90a",), False),
        ((10, 3), ("sm_100",), True),
        ((7, 0), (), False),
    ],
)
def test_kernels_run_on_their_architecture_and_its_later_minor_versions(
    capability, architectures, runs
):
    assert has_kernels(capability, architectures) is runs


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"torch_cuda": None}, "a build without CUDA"),
        ({"driver_cuda": "12.4", "driver": "550.54"}, "driver 550.54 runs CUDA up to 12.4"),
        ({}, "torch sees no GPU"),
        ({"driver": None, "driver_cuda": None}, "torch sees no GPU"),
    ],
)
def test_a_driver_whose_gpus_torch_does_not_see_is_an_error_with_its_reason(changes, words):
    (error,) = of_severity("error", gpus=(), **changes)
    assert words in error.what


def test_a_driver_of_the_same_major_cuda_is_new_enough():
    (error,) = of_severity("error", gpus=(), driver_cuda="13.0")
    assert "torch sees no GPU" in error.what


def test_a_machine_without_a_driver_trains_on_its_cpu():
    changes = {"gpus": (), "has_nvidia_device": False, "driver": None, "driver_cuda": None}
    assert of_severity("error", **changes) == []
    (note,) = of_severity("note", **changes)
    assert "trains on its CPU" in note.what


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shm_gib": 0.06}, "/dev/shm has 0.06 GiB free"),
        ({"disk_gib": 5.0}, "5.0 GiB free"),
        ({"open_files": 256}, "256 files open"),
        ({"cores": 8}, "8 cores for 8 GPUs"),
        ({"gpus": (A100, replace(A100, name="NVIDIA H100 80GB HBM3"))}, "GPUs of 2 kinds"),
    ],
)
def test_what_slows_training_or_may_stop_it_is_a_warning_with_a_way_out(changes, words):
    if "gpus" in changes:
        changes = {**changes, "gpus": (A100, GpuFacts("NVIDIA H100 80GB HBM3", 79.1, (9, 0)))}
    (warning,) = of_severity("warning", **changes)
    assert words in warning.what
    assert warning.way_out


def test_missing_packages_and_tools_are_named():
    (error,) = of_severity("error", missing=("peft", "bitsandbytes"))
    assert error.what == "not installed: peft, bitsandbytes"
    (note,) = of_severity("note", tools={"g++": None, "ninja": "/usr/bin/ninja"})
    assert note.what.startswith("g++ not found")
    wanted = ["click>=8.2", "surely-not-installed>=1", "nor-this; extra == 'more'"]
    assert missing_packages(wanted) == ("surely-not-installed",)


def test_errors_come_first():
    found = examine(replace(HEALTHY, gpus=(V100,), shm_gib=0.0, missing=("peft",)))
    assert [f.severity for f in found] == ["error", "error", "warning"]


def test_the_drivers_versions_are_read_from_the_head_of_nvidia_smi():
    head = "| NVIDIA-SMI 550.54.14   Driver Version: 550.54.14   CUDA Version: 12.4  |"
    assert read_nvidia_smi(head) == ("550.54.14", "12.4")
    assert read_nvidia_smi("NVIDIA-SMI has failed") == (None, None)


def test_doctor_shows_this_machine_and_its_exit_status_says_whether_training_can_run():
    done = CliRunner().invoke(main, ["doctor", "--json"])
    record = json.loads(done.stdout)
    assert {"phi3v-train", "torch", "transformers"} <= record["facts"]["packages"].keys()
    assert record["facts"]["missing"] == []
    has_errors = any(f["severity"] == "error" for f in record["findings"])
    assert done.exit_code == int(has_errors)
    text = CliRunner().invoke(main, ["doctor"])
    assert text.exit_code == done.exit_code
    assert record["facts"]["python"] in text.stdout
    assert "/dev/shm" in text.stdout
