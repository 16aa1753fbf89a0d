"""That vLLM's own Phi3V class finds a place for every weight we write, by its rules restated.

vLLM needs a GPU and pins its own torch, so it is not run here. What stands below was read from the
release 0.33.0: `vllm/model_executor/models/phi3v.py` (`hf_to_vllm_mapper`, the modules that
`Phi3VForCausalLM` makes), `clip.py` (how many layers, what `CLIPVisionTransformer.load_weights`
drops, q, k and v stacked), `llama.py` (the language model, its stacked names) and `utils.py`
(`WeightsMapper`: every prefix that fits, one after the other; `AutoWeightsLoader`: an unknown name
is an error, unless it ends in `.bias`: that is passed over in silence).

What this proves: under those rules no weight of ours is refused, lost or of the wrong shape, and no
parameter of vLLM's stays unfilled. What it does not: that a later release keeps the rules, or that
vLLM then computes the same numbers.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from phi3v_train.configuration_phi3_v import Phi3VConfig
from phi3v_train.modeling_phi3_v import Phi3VForCausalLM
from safetensors.torch import load_file

Shape = tuple[int, ...]

PREFIXES = {
    "model.vision_embed_tokens.wte": "embed_tokens",
    "model.vision_embed_tokens.": "vision_embed_tokens.",
    "lm_head.": "language_model.lm_head.",
    "model.": "language_model.model.",
}
TOWER = "vision_embed_tokens.img_processor.vision_model."
STACKED = {".q_proj": (".qkv_proj", 0), ".k_proj": (".qkv_proj", 1), ".v_proj": (".qkv_proj", 2)}
"""In the tower: the parameter that a weight becomes a third of, and which third."""
NUM_TOWER_LAYERS = 24 - 2 + 1
"""`layer_idx` of the official config is -2; the layers behind it and the last norm are not made."""


def destination(name: str) -> tuple[str, int | None] | None:
    """The parameter that a checkpoint name goes to, and which third of it; None: left out."""
    for old, new in PREFIXES.items():
        if name.startswith(old):
            name = name.replace(old, new, 1)
    if not name.startswith(TOWER):
        return name, None
    inner = name.removeprefix(TOWER)
    parts = inner.split(".")
    if parts[:2] == ["encoder", "layers"] and int(parts[2]) >= NUM_TOWER_LAYERS:
        return None
    if inner.startswith("post_layernorm."):
        return None
    for part, (whole, third) in STACKED.items():
        if part in inner:
            return TOWER + inner.replace(part, whole, 1), third
    return name, None


def parameters() -> dict[str, Shape]:
    """The parameters of vLLM's `Phi3VForCausalLM` for the official config, on one GPU."""
    hidden, mlp, vocabulary, width = 3072, 8192, 32064, 1024
    shapes: dict[str, Shape] = {
        "embed_tokens.weight": (vocabulary, hidden),
        "language_model.model.embed_tokens.weight": (vocabulary, hidden),
        "language_model.model.norm.weight": (hidden,),
        "language_model.lm_head.weight": (vocabulary, hidden),
        "vision_embed_tokens.glb_GN": (1, 1, 4 * width),
        "vision_embed_tokens.sub_GN": (1, 1, 1, 4 * width),
        "vision_embed_tokens.img_projection.0.weight": (hidden, 4 * width),
        "vision_embed_tokens.img_projection.0.bias": (hidden,),
        "vision_embed_tokens.img_projection.2.weight": (hidden, hidden),
        "vision_embed_tokens.img_projection.2.bias": (hidden,),
        TOWER + "embeddings.class_embedding": (width,),
        TOWER + "embeddings.patch_embedding.weight": (width, 3, 14, 14),
        TOWER + "embeddings.position_embedding.weight": (577, width),
        TOWER + "pre_layrnorm.weight": (width,),
        TOWER + "pre_layrnorm.bias": (width,),
    }
    for layer in range(32):
        at = f"language_model.model.layers.{layer}."
        shapes |= {
            at + "self_attn.qkv_proj.weight": (3 * hidden, hidden),
            at + "self_attn.o_proj.weight": (hidden, hidden),
            at + "mlp.gate_up_proj.weight": (2 * mlp, hidden),
            at + "mlp.down_proj.weight": (hidden, mlp),
            at + "input_layernorm.weight": (hidden,),
            at + "post_attention_layernorm.weight": (hidden,),
        }
    for layer in range(NUM_TOWER_LAYERS):
        at = f"{TOWER}encoder.layers.{layer}."
        shapes |= {
            at + "self_attn.qkv_proj.weight": (3 * width, width),
            at + "self_attn.qkv_proj.bias": (3 * width,),
            at + "self_attn.out_proj.weight": (width, width),
            at + "self_attn.out_proj.bias": (width,),
            at + "mlp.fc1.weight": (4 * width, width),
            at + "mlp.fc1.bias": (4 * width,),
            at + "mlp.fc2.weight": (width, 4 * width),
            at + "mlp.fc2.bias": (width,),
            at + "layer_norm1.weight": (width,),
            at + "layer_norm1.bias": (width,),
            at + "layer_norm2.weight": (width,),
            at + "layer_norm2.bias": (width,),
        }
    return shapes


def load(weights: dict[str, Shape]) -> tuple[dict[str, list[int | None]], set[str]]:
    """What a checkpoint fills, by thirds, and which of its names are left out.

    Raises:
        ValueError: a name that has no parameter, or one of another shape.
    """
    wanted = parameters()
    filled: dict[str, list[int | None]] = defaultdict(list)
    left_out: set[str] = set()
    for name, shape in weights.items():
        place = destination(name)
        if place is None:
            left_out.add(name)
            continue
        parameter, third = place
        if parameter not in wanted:
            if not parameter.endswith(".bias"):
                raise ValueError(f"no parameter {parameter!r} for {name!r}")
            left_out.add(name)
            continue
        whole = wanted[parameter]
        expected = whole if third is None else (whole[0] // 3, *whole[1:])
        if shape != expected:
            raise ValueError(f"{name!r}: expected {expected}, got {shape}")
        filled[parameter].append(third)
    return filled, left_out


@pytest.fixture(scope="module")
def weights() -> dict[str, Shape]:
    """Names and shapes that we write for the real model."""
    with torch.device("meta"):
        model = Phi3VForCausalLM(Phi3VConfig())
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def test_every_parameter_of_vllm_is_filled_and_only_what_is_never_computed_is_left_out(
    weights: dict[str, Shape],
) -> None:
    filled, left_out = load(weights)
    # The second embedding table is tied to the first when the checkpoint has none.
    assert set(parameters()) - set(filled) == {"embed_tokens.weight"}
    for parameter, thirds in filled.items():
        is_stacked = parameter.startswith(TOWER) and ".qkv_proj." in parameter
        assert sorted(thirds, key=str) == ([0, 1, 2] if is_stacked else [None]), parameter
    assert left_out
    never_computed = ("encoder.layers.23.", "post_layernorm.")
    tower = "model.vision_embed_tokens.img_processor.vision_model."
    assert left_out == {
        name for name in weights if name.removeprefix(tower).startswith(never_computed)
    }


@pytest.mark.parametrize(
    "renamed",
    [
        ("lm_head.weight", "base_model.model.lm_head.weight"),
        ("model.norm.weight", "model.norm.base_layer.weight"),
        ("model.layers.0.self_attn.qkv_proj.weight", "model.layers.0.attn.qkv_proj.weight"),
        ("model.vision_embed_tokens.glb_GN", "model.vision.glb_GN"),
    ],
)
def test_a_weight_by_another_name_is_refused(
    weights: dict[str, Shape], renamed: tuple[str, str]
) -> None:
    official, other = renamed
    changed = {other if name == official else name: shape for name, shape in weights.items()}
    with pytest.raises(ValueError, match="no parameter"):
        load(changed)


def small_model(**changes: Any) -> Phi3VForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    return Phi3VForCausalLM(
        Phi3VConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_attention_heads=2,
            pad_token_id=0,
            image_token_id=5,
            vision_config=sizes,
            **changes,
        )
    )


def test_a_saved_model_has_the_names_checked_above(
    tmp_path: Path, weights: dict[str, Shape]
) -> None:
    small_model().save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(weights)


def test_merged_adapters_leave_the_names_checked_above(
    tmp_path: Path, weights: dict[str, Shape]
) -> None:
    targets = r".*\.(qkv_proj|o_proj|gate_up_proj|down_proj|q_proj|fc1|img_projection\.0)|lm_head"
    adapted = get_peft_model(small_model(), LoraConfig(r=2, target_modules=targets))
    merged: Any = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(weights)
