"""What trains, and in what precision: full weights or LoRA adapters, by parts of the model.

    vision      CLIP                                model.vision_embed_tokens.img_processor
    projector   image projection and separators     model.vision_embed_tokens.{img_projection,*_GN}
    llm         everything else                     embedding, decoder layers, norm, lm_head

Users name parts, not modules: a list of module names that fits another model matches half of this
one and says nothing. The only module that imports peft.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from phi3v_train.config import MethodConfig, Part
from phi3v_train.configuration_phi3_v import Phi3VConfig
from phi3v_train.modeling_phi3_v import Phi3VForCausalLM
from phi3v_train.quiet import quiet

Precision = Literal["fp32", "bf16", "fp16"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_VISION = "model.vision_embed_tokens.img_processor."
_PROJECTOR = "model.vision_embed_tokens."

_PEFT_ASKS = "`is_gradient_checkpointing` is deprecated"
"""PEFT reads a property of the model that transformers has renamed; users can't change that."""


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


def part_of(name: str) -> Part:
    """The part of the model that a parameter or module belongs to, by its official name."""
    if name.startswith(_VISION):
        return "vision"
    return "projector" if name.startswith(_PROJECTOR) else "llm"


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


def load_model(folder: str | Path, dtype: torch.dtype = torch.float32) -> Phi3VForCausalLM:
    """Load a model folder on the CPU.

    Raises:
        ValueError: it is not a Phi-3-vision model folder, or its weights are missing.
    """
    read_model_config(folder)
    try:
        with quiet():
            return Phi3VForCausalLM.from_pretrained(folder, dtype=dtype)
    except OSError as error:
        raise ValueError(f"{folder}: {error}") from error


def load_for_inference(
    folder: str | Path, *, adapter: str | Path | None = None, device: str = "auto"
) -> Phi3VForCausalLM:
    """Load a model folder to answer with: on its device, in the precision that suits that.

    Args:
        folder: Hugging Face model folder.
        adapter: PEFT folder to put on the model.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        ValueError: a folder that is not what it should be.
    """
    from phi3v_train.engine import join_world

    world = join_world(device)
    dtype = _DTYPES[choose_precision("auto", world.device)]
    model = load_model(folder, dtype)
    if adapter is not None:
        model = load_adapter(model, adapter)
    move(model, world.device)
    return model.eval()


def prepare(
    model: Phi3VForCausalLM, method: MethodConfig, precision: Precision, *, seed: int = 0
) -> TrainingModel:
    """Freeze, add adapters, choose dtypes.

    Full training keeps float32 weights and computes in the lower precision; LoRA keeps the frozen
    base in the lower precision and its adapters in float32.

    Args:
        model: as loaded, float32.
        method: what trains.
        precision: of `choose_precision`.
        seed: of the adapters' first weights.

    Raises:
        ValueError: a LoRA target that matches no layer.
    """
    vision = model.model.vision_embed_tokens.img_processor.vision_model
    model.requires_grad_(True)
    for module in vision.never_computed():
        module.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if part_of(name) not in method.trained_parts:
            parameter.requires_grad_(False)
    model.model.gradient_checkpointing = method.gradient_checkpointing
    vision.gradient_checkpointing = method.gradient_checkpointing

    dtype = None if precision == "fp32" else _DTYPES[precision]
    adapters = None
    if method.name == "lora":
        if dtype is not None:
            move(model, dtype)
        adapters = _add_adapters(model, method, seed)
    return TrainingModel(model, adapters, dtype)


def lora_targets(model: Phi3VForCausalLM, parts: tuple[Part, ...]) -> str:
    """A regular expression over official module names: the linear layers of `parts`.

    As in the recipe: all linear layers of the decoder and its head, of CLIP without its last
    layer (which is never computed), and of the projection.
    """
    num_layers = len(model.model.vision_embed_tokens.img_processor.vision_model.encoder.layers)
    computed = "|".join(str(layer) for layer in range(num_layers - 1))
    patterns: dict[Part, str] = {
        "llm": r"model\.layers\.\d+\.(self_attn\.(qkv_proj|o_proj)|mlp\.(gate_up_proj|down_proj))"
        r"|lm_head",
        "vision": r"model\.vision_embed_tokens\.img_processor\.vision_model\.encoder\.layers"
        rf"\.({computed})\.(self_attn\.(q_proj|k_proj|v_proj|out_proj)|mlp\.(fc1|fc2))",
        "projector": r"model\.vision_embed_tokens\.img_projection\.(0|2)",
    }
    return "|".join(patterns[part] for part in parts)


def _add_adapters(model: Phi3VForCausalLM, method: MethodConfig, seed: int) -> Any:
    import peft

    torch.manual_seed(seed)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=method.lora.rank,
        lora_alpha=method.lora.alpha,
        lora_dropout=method.lora.dropout,
        target_modules=lora_targets(model, method.trained_parts),
        init_lora_weights="gaussian",
    )
    with quiet(_PEFT_ASKS):
        adapters = peft.get_peft_model(model, settings)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    for part in method.trained_parts:
        if not any(part_of(n) == part for n, p in model.named_parameters() if p.requires_grad):
            raise ValueError(f"method.lora.targets: {part} has no layer that takes an adapter")
    return adapters


def load_adapter(model: Phi3VForCausalLM, folder: str | Path) -> Phi3VForCausalLM:
    """Put saved adapters on a model.

    Raises:
        ValueError: the folder holds no PEFT adapter, or one of another base.
    """
    if not (Path(folder) / "adapter_config.json").is_file():
        raise ValueError(f"{folder} is not an adapter folder: it has no adapter_config.json")
    import peft

    try:
        with quiet(_PEFT_ASKS):
            adapters = peft.PeftModel.from_pretrained(model, str(folder))
    except RuntimeError as error:
        raise ValueError(f"{folder} does not fit the model: {error}") from error
    base = adapters.get_base_model()
    assert isinstance(base, Phi3VForCausalLM)
    return base
