"""What GPUs could compute at most: the denominator of MFU.

    peak_flops("NVIDIA A100-SXM4-80GB", "bf16")      # 312e12, per GPU and second
    peak_flops("NVIDIA A100-SXM4-80GB", "fp32")      # 19.5e12: no TF32, as torch has it
    peak_flops("Some other GPU", "bf16")             # None: then there is no MFU

NVIDIA's data sheets, dense (without the structured sparsity that the larger numbers there assume),
tensor cores with 32-bit accumulation in bf16 and fp16. GPUs are found by the name that the driver
gives them.
"""

from dataclasses import dataclass

TERA = 1e12


@dataclass(frozen=True, slots=True)
class Peak:
    """A kind of GPU."""

    name: str
    """Part of what the driver calls it."""

    half: float
    """TFLOP/s in bf16 and fp16; of GPUs older than Ampere in fp16 alone."""

    single: float
    """TFLOP/s in fp32, not TF32."""

    has_bf16: bool = True


PEAKS = (
    Peak("B200", 2250, 75),
    Peak("GH200", 990, 67),
    Peak("H200", 989, 67),
    Peak("H100 NVL", 835, 60),
    Peak("H100 PCIe", 756, 51),
    Peak("H100", 989, 67),
    Peak("H20", 148, 44),
    Peak("A100", 312, 19.5),
    Peak("A800", 312, 19.5),
    Peak("A30", 165, 10.3),
    Peak("A40", 149.7, 37.4),
    Peak("A10G", 70, 35),
    Peak("A10", 125, 31.2),
    Peak("L40S", 362, 91.6),
    Peak("L40", 181, 90.5),
    Peak("L4", 121, 30.3),
    Peak("V100-PCIE", 112, 14, has_bf16=False),
    Peak("V100", 125, 15.7, has_bf16=False),
    Peak("T4", 65, 8.1, has_bf16=False),
    Peak("Quadro RTX 8000", 130.5, 16.3, has_bf16=False),
    Peak("RTX 6000 Ada", 364.2, 91.1),
    Peak("RTX A6000", 154.8, 38.7),
    Peak("RTX A5000", 111.1, 27.8),
    Peak("RTX 5090", 209.5, 104.8),
    Peak("RTX 4090", 165.2, 82.6),
    Peak("RTX 3090", 71, 35.6),
)
"""In the order in which they are looked for: a name may be the beginning of another."""


def peak_flops(device_name: str, precision: str) -> float | None:
    """Operations a second that a GPU could do at most.

    Args:
        device_name: of the driver, as `torch.cuda.get_device_name` says it.
        precision: `bf16`, `fp16` or `fp32`.

    Returns:
        None where the GPU is not known, or has no tensor cores for the precision.
    """
    for peak in PEAKS:
        if peak.name in device_name:
            if precision == "fp32":
                return peak.single * TERA
            if precision == "bf16" and not peak.has_bf16:
                return None
            return peak.half * TERA
    return None
