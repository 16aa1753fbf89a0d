import pytest
from phi3v_train.peaks import PEAKS, peak_flops


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5e12),
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H200", "bf16", 989e12),
        ("Tesla V100-SXM2-32GB", "fp16", 125e12),
        ("Tesla V100-PCIE-32GB", "fp16", 112e12),
        ("NVIDIA A10G", "bf16", 70e12),
        ("NVIDIA L4", "fp16", 121e12),
        ("NVIDIA L40S", "fp16", 362e12),
        ("NVIDIA RTX A6000", "bf16", 154.8e12),
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("NVIDIA GB999", "bf16", None),
    ],
)
def test_a_gpu_is_known_by_the_name_of_its_driver(
    name: str, precision: str, expected: float | None
) -> None:
    assert peak_flops(name, precision) == expected


def test_no_name_hides_a_longer_one_behind_it() -> None:
    for number, peak in enumerate(PEAKS):
        hidden = [later.name for later in PEAKS[number + 1 :] if peak.name in later.name]
        assert hidden == [], peak.name
