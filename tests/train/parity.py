"""Where the recorded numbers of the reference are, and how its tiny model is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from phi3v_train.configuration_phi3_v import Phi3VConfig
from phi3v_train.modeling_phi3_v import Phi3VForCausalLM
from phi3v_train.processing_phi3_v import Phi3VProcessor
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

PARITY = Path(__file__).resolve().parents[3] / "shared" / "parity"

FORWARD_CASES = [
    "text_only",
    "text_only_no_mask",
    "one_image",
    "two_images",
    "batch_recipe_mask",
    "batch_length_mask",
    "rope_len_64",
    "rope_len_65",
    "rope_long_image",
    "rope_padded_batch_row1_alone",
    "end_to_end",
]

needs_parity = pytest.mark.skipif(
    not PARITY.is_dir(), reason="the reference's recorded numbers are not beside this checkout"
)


def read_json(name: str) -> Any:
    return json.loads((PARITY / name).read_text())


def reference_model(config_name: str = "config.json", **changes: Any) -> Phi3VForCausalLM:
    config = Phi3VConfig(
        **{
            **read_json(f"model/{config_name}"),
            "vision_config": read_json("model/vision_config.json"),
            **changes,
        }
    )
    model = Phi3VForCausalLM(config).float()
    weights = {k: v.float() for k, v in load_file(PARITY / "model/weights.safetensors").items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not missing
    assert set(unexpected) <= {"model.vision_embed_tokens.wte.weight"}
    return model.eval()


def read_case(name: str) -> dict[str, Tensor]:
    case = read_json("model/cases.json")[name]
    tensors = load_file(PARITY / "model" / case["tensors"])
    base = tensors
    if source := case.get("pixel_base_from"):
        base = load_file(PARITY / "model" / source)
    if "pixel_base" in base:
        pixels = base["pixel_base"].float()
        tensors["pixel_values"] = pixels.repeat_interleave(4, -1).repeat_interleave(4, -2)
    return tensors


def model_inputs(case: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    wanted = names or ("input_ids", "attention_mask", "pixel_values", "image_sizes", "labels")
    return {name: case[name] for name in wanted if name in case}


def inputs_of(name: str, case: dict[str, Tensor]) -> dict[str, Tensor]:
    inputs = model_inputs(case)
    recipe = read_json("model/cases.json")[name]
    if "image" in recipe:  # the picture itself, not its views, was recorded
        folder = PARITY / "phi-3.5-vision"
        processor = Phi3VProcessor.from_pretrained(folder, num_crops=recipe["num_crops"])
        image = Image.open(PARITY / "model" / recipe["image"])
        prompt = f"<|user|>\n{recipe['messages'][0]['content']}<|end|>\n<|assistant|>\n"
        encoded = processor(prompt, [image])
        prompt_ids = inputs["input_ids"][:, : encoded["input_ids"].shape[1]]
        assert torch.equal(encoded["input_ids"], prompt_ids)
        inputs["pixel_values"] = encoded["pixel_values"]
    return inputs


def real_positions(case: dict[str, Tensor]) -> Tensor:
    mask = case.get("attention_mask", torch.ones_like(case["input_ids"]))
    return mask.bool()


def model_of(name: str, implementation: str = "sdpa") -> Phi3VForCausalLM:
    config = read_json("model/cases.json")[name]["config"]
    return reference_model(config, attn_implementation=implementation)


def run_lengths(pairs: list[list[int]]) -> list[int]:
    return [value for value, count in pairs for _ in range(count)]


def probe(gradient: Tensor) -> float:
    flat = gradient.double().flatten()
    weights = torch.cos(0.1 * torch.arange(len(flat), dtype=torch.float64))
    return float((flat * weights).sum())
