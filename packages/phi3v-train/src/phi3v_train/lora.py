"""Low-rank adapters: which layers get them, and the folder they are saved in.

    adapters = add_adapters(model, config.method, seed=0)
    save_adapter(adapters, Path("runs/lora/adapter"))

    runs/lora/adapter/
        adapter_config.json          PEFT's own
        adapter_model.safetensors    base_model.model.<module>.lora_A.weight, lora_B.weight
                                     base_model.model.<name> of parts that train in full

Parts that train in full keep their official names, beside the adapters in the same file: PEFT puts
weights that it finds under a name of the model where they belong, so such a folder loads like any
other, `merge_and_unload` included. (Its own way, `modules_to_save`, has no place for the two
separators, which are bare parameters, and keeps a second copy of every such module.)

The only module that imports peft.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from phi3v_train.config import MethodConfig, Part
from phi3v_train.model_parts import linear_layers
from phi3v_train.modeling_phi3_v import Phi3VForCausalLM
from phi3v_train.quiet import quiet

_PEFT_ASKS = "`is_gradient_checkpointing` is deprecated"
"""PEFT reads a property of the model that transformers has renamed; users can't change that."""

_PREFIX = "base_model.model."
"""PEFT's, in front of official names."""

WEIGHTS_FILE = "adapter_model.safetensors"

_SET_BY = {
    "r": "method.lora.rank",
    "lora_alpha": "method.lora.alpha",
    "lora_dropout": "method.lora.dropout",
    "target_modules": "method.lora.targets",
    "modules_to_save": "method.lora.full",
    "trainable_token_indices": "method.lora.full",
}
"""Fields of PEFT's that have a key of their own here."""

_REFUSED = {
    **dict.fromkeys(
        ("task_type", "peft_type", "inference_mode", "auto_mapping", "peft_version", "revision"),
        "is not a matter of training",
    ),
    "base_model_name_or_path": "follows from model",
    "layer_replication": "makes another model of the base",
    **dict.fromkeys(
        ("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        "starts from other weights than the base's, or from data",
    ),
}

_FIRST_WEIGHTS = (True, False, "gaussian", "orthogonal")
"""Values of `init_lora_weights` that leave the base as it is. PiSSA and its like change it, and
their adapters fit no other copy of it."""


def check_extra(extra: Mapping[str, Any]) -> None:
    """Refuse fields that PEFT doesn't have, or that are set in another way.

    Raises:
        ValueError: names the first such field of `method.lora.extra`.
    """
    import peft

    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    for name, value in extra.items():
        if name in _SET_BY:
            raise ValueError(f"method.lora.extra: {name} is set by {_SET_BY[name]}; use that")
        if name in _REFUSED:
            raise ValueError(f"method.lora.extra: {name} can't be set, it {_REFUSED[name]}")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "see its LoraConfig for the fields"
            raise ValueError(f"method.lora.extra: PEFT {peft.__version__} has no {name}; {hint}")
        if name == "init_lora_weights" and value not in _FIRST_WEIGHTS:
            raise ValueError(
                f"method.lora.extra: init_lora_weights {value!r} changes the base; expected one of "
                + ", ".join(str(choice).lower() for choice in _FIRST_WEIGHTS)
            )


def lora_targets(model: Phi3VForCausalLM, parts: tuple[Part, ...]) -> str:
    """A regular expression over official module names: the layers of `parts` that get adapters.

    Raises:
        ValueError: a part has no such layer.
    """
    names = [name for name, _ in model.named_modules()]
    patterns: list[str] = []
    for part in parts:
        pattern = linear_layers(model, part)
        if not any(re.fullmatch(pattern, name) for name in names):
            raise ValueError(f"method.lora.targets: {part} has no layer that takes an adapter")
        patterns.append(pattern)
    return "|".join(patterns)


def add_adapters(model: Phi3VForCausalLM, method: MethodConfig, *, seed: int) -> Any:
    """Put adapters into a model, in place; they are float32 whatever the base is.

    Args:
        model: whose weights train is for the caller to say afterwards: PEFT freezes all of them.
        method: places and sizes.
        seed: of the first weights.

    Returns:
        The PEFT model around `model`.

    Raises:
        ValueError: a part without a layer that takes an adapter, or settings that PEFT refuses.
    """
    import peft

    check_extra(method.lora.extra)
    torch.manual_seed(seed)
    fields = {"init_lora_weights": "gaussian", **method.lora.extra}
    targets = lora_targets(model, method.adapter_parts)
    try:
        settings = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=method.lora.rank,
            lora_alpha=method.lora.lora_alpha,
            lora_dropout=method.lora.dropout,
            target_modules=targets,
            **fields,
        )
        with quiet(_PEFT_ASKS):
            adapters = peft.get_peft_model(model, settings)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        if not method.lora.extra:
            raise
        raise ValueError(f"method.lora.extra {method.lora.extra}: PEFT says: {error}") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapters


def adapter_weights(
    adapters: Any, trained: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """What an adapter's weight file holds, by the names in it.

    Args:
        adapters: of `add_adapters`.
        trained: all that trained, by name in the model, where its values are not the model's own:
            gathered from ranks, or read from a checkpoint.
    """
    import peft

    if trained is None:
        model = adapters.get_base_model()
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    named = {_PREFIX + name: tensor for name, tensor in trained.items()}
    # An adapter on lm_head makes PEFT store the frozen head itself too; the base has it.
    weights: dict[str, Tensor] = peft.get_peft_model_state_dict(
        adapters, state_dict=named, save_embedding_layers=False
    )
    own = {name: tensor for name, tensor in named.items() if ".lora_" not in name}
    return {name: tensor.contiguous().cpu() for name, tensor in {**weights, **own}.items()}


def save_adapter(adapters: Any, folder: Path, trained: Mapping[str, Tensor] | None = None) -> None:
    """Write `adapter_config.json` and the weights into an existing folder.

    Args:
        adapters: of `add_adapters`.
        folder: to write to.
        trained: of `adapter_weights`.
    """
    settings = dataclasses.replace(adapters.peft_config["default"], inference_mode=True)
    settings.save_pretrained(str(folder))
    weights = adapter_weights(adapters, trained)
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def open_adapter(model: Phi3VForCausalLM, folder: str | Path) -> Any:
    """Put saved adapters on a model, and what trained beside them into it.

    Returns:
        The PEFT model around `model`.

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
    # PEFT passes over what it finds no place for.
    places = {_PREFIX + name for name, _ in base.named_parameters()}
    with safe_open(Path(folder) / WEIGHTS_FILE, framework="pt") as file:
        homeless = [n for n in file.keys() if ".lora_" not in n and n not in places]
    if homeless:
        raise ValueError(f"{folder} does not fit the model, which has no {homeless[0]}")
    return adapters


def load_adapter(model: Phi3VForCausalLM, folder: str | Path) -> Phi3VForCausalLM:
    """The model itself, with saved adapters on it and what trained beside them in it.

    Raises:
        ValueError: the folder holds no PEFT adapter, or one of another base.
    """
    return open_adapter(model, folder).get_base_model()


def merge_adapters(adapters: Any) -> Phi3VForCausalLM:
    """Add adapters into the weights they stand beside, in place and in the weights' own dtype.

    Args:
        adapters: of `add_adapters` or `open_adapter`.

    Returns:
        The model, without adapters and with its official names.

    Raises:
        ValueError: the merged weights are not finite.
    """
    merged = adapters.merge_and_unload(safe_merge=True)
    assert isinstance(merged, Phi3VForCausalLM)
    return merged


def base_of_adapter(folder: Path) -> str | None:
    """The model folder that an adapter was trained on, as its configuration names it.

    Raises:
        ValueError: the folder holds no PEFT adapter.
    """
    import peft

    if not (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} is not an adapter folder: it has no adapter_config.json")
    return peft.PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
