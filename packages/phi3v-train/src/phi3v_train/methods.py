"""What trains, and in what precision: full weights, or adapters beside frozen ones.

    training = load_to_train(config.model, config.method, "bf16", seed=0)
    training.trainable      # {"model.layers.0.self_attn.qkv_proj.lora_A.default.weight": ...}

    method      weights that train        the others            adapters
    full        float32                   float32               none
    lora        float32 (lora.full)       the precision's own   float32
    qlora       float32 (lora.full)       decoder layers nf4    float32

In bf16 and fp16 the products over float32 weights are computed in the lower precision (autocast).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from phi3v_train.config import MethodConfig
from phi3v_train.configuration_phi3_v import Phi3VConfig
from phi3v_train.lora import add_adapters, check_extra, load_adapter
from phi3v_train.model_parts import part_of
from phi3v_train.modeling_phi3_v import Phi3VForCausalLM
from phi3v_train.quantized import num_weights, quantize_decoder
from phi3v_train.quiet import quiet

Precision = Literal["fp32", "bf16", "fp16"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class TrainingModel:
    """A model made ready to train."""

    model: Phi3VForCausalLM
    """The model itself, adapters in it where there are any."""
    adapters: Any
    """The PEFT model around it, or None."""
    autocast_dtype: torch.dtype | None
    """dtype of matrix products over float32 weights; None: the weights' own."""

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    @property
    def num_parameters(self) -> int:
        """All weights, adapters included, however few bits they are kept in."""
        return sum(num_weights(p) for p in self.model.parameters())


def choose_precision(precision: str, device: torch.device) -> Precision:
    """Resolve `auto`: bf16 on a GPU that has it, fp16 on an older one, fp32 on a CPU.

    Raises:
        ValueError: fp16 on a CPU, where it has no kernels worth the name.
    """
    if precision == "auto":
        if device.type == "cpu":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("precision=fp16 needs a GPU; on a CPU use precision=fp32 or bf16")
    assert precision in ("fp32", "bf16", "fp16")
    return precision


def move(model: Phi3VForCausalLM, to: torch.device | torch.dtype) -> None:
    """Move a model to a device or dtype, in place."""
    # transformers wraps `to` in a way that hides its signature.
    nn.Module.to(model, to)


def read_model_config(folder: str | Path) -> Phi3VConfig:
    """The configuration of a model folder.

    Raises:
        ValueError: it is not a Phi-3-vision model folder.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a model folder: it has no config.json. Download the model there, or "
            "make a tiny one with `phi3v-train init tiny`"
        )
    try:
        kind = json.loads(path.read_text())["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a model configuration: {error}") from None
    if kind != Phi3VConfig.model_type:
        raise ValueError(f"{path}: expected model_type phi3_v, got {kind!r}")
    return Phi3VConfig.from_pretrained(folder)


def load_model(folder: str | Path, dtype: torch.dtype | None = torch.float32) -> Phi3VForCausalLM:
    """Load a model folder on the CPU.

    Args:
        folder: Hugging Face model folder.
        dtype: of the weights; None: as they were saved.

    Raises:
        ValueError: it is not a Phi-3-vision model folder, or its weights are missing.
    """
    read_model_config(folder)
    try:
        with quiet():
            return Phi3VForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
    except OSError as error:
        raise ValueError(f"{folder}: {error}") from error


def load_for_inference(
    folder: str | Path, *, adapter: str | Path | None = None, device: str | torch.device = "auto"
) -> Phi3VForCausalLM:
    """Load a model folder to answer with: on its device, in the precision that suits that.

    Args:
        folder: Hugging Face model folder.
        adapter: PEFT folder to put on the model.
        device: `auto`, `cpu` or `cuda`; or the device of this process among several.

    Raises:
        ValueError: a folder that is not what it should be.
    """
    from phi3v_train.engine import join_world

    place = device if isinstance(device, torch.device) else join_world(device).device
    dtype = _DTYPES[choose_precision("auto", place)]
    model = load_model(folder, dtype)
    if adapter is not None:
        model = load_adapter(model, adapter)
    move(model, place)
    return model.eval()


def load_to_train(
    folder: str | Path,
    method: MethodConfig,
    precision: Precision,
    *,
    seed: int = 0,
    device: torch.device | None = None,
) -> TrainingModel:
    """Load a model folder and `prepare` it, on the CPU.

    Args:
        folder: Hugging Face model folder.
        method: what trains.
        precision: of `choose_precision`.
        seed: of the adapters' first weights.
        device: of `prepare`.

    Raises:
        ValueError: a folder that is not what it should be, or a method that doesn't fit it.
    """
    if method.has_adapters:
        check_extra(method.lora.extra)  # before minutes of loading
    return prepare(load_model(folder, dtype=None), method, precision, seed=seed, device=device)


def prepare(
    model: Phi3VForCausalLM,
    method: MethodConfig,
    precision: Precision,
    *,
    seed: int = 0,
    device: torch.device | None = None,
) -> TrainingModel:
    """Freeze, quantise, add adapters, choose dtypes; in place.

    Args:
        model: as loaded, in any dtype, on any device (the meta device too).
        method: what trains.
        precision: of `choose_precision`.
        seed: of the adapters' first weights.
        device: where 4-bit weights go at once, so that they are never there in full; None: they
            stay where they are. The rest is for the caller to move.

    Raises:
        ValueError: a method that doesn't fit the model; one line.
    """
    vision = model.model.vision_embed_tokens.img_processor.vision_model
    model.model.gradient_checkpointing = method.gradient_checkpointing
    vision.gradient_checkpointing = method.gradient_checkpointing
    dtype = _DTYPES[precision]

    adapters = None
    if method.has_adapters:
        for name, parameter in model.named_parameters():
            own = torch.float32 if part_of(name) in method.full_parts else dtype
            parameter.data = parameter.data.to(own)
        if method.name == "qlora":
            quantize_decoder(model, dtype, device)
        adapters = add_adapters(model, method, seed=seed)
    else:
        move(model, torch.float32)
    never = {p for module in vision.never_computed() for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if part_of(name) in method.full_parts:
            parameter.requires_grad_(parameter not in never)
        elif part_of(name) not in method.adapter_parts or parameter in never:
            parameter.requires_grad_(False)
    return TrainingModel(model, adapters, None if precision == "fp32" else dtype)
