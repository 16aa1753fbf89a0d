"""Saving and loading a folder: official names, shards, devices, and what it takes in memory."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from phi3v_train.methods import load_model
from phi3v_train.modeling_phi3_v import Phi3VForCausalLM
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.train.parity import PARITY, needs_parity, read_json, reference_model
from tests.train.small_models import (
    Prompt,
    call_inputs,
    gradients,
    packed_row,
    small_config,
    small_model,
)

ROOT = Path(__file__).resolve().parents[2]
WTE = "model.vision_embed_tokens.wte.weight"
VISION = "model.vision_embed_tokens.img_processor.vision_model."
PROMPTS = [Prompt(12, ((1, 2),), seed=1), Prompt(10, (), seed=2)]


def logits_of(model: Phi3VForCausalLM) -> Tensor:
    with torch.no_grad():
        return model.eval()(**call_inputs(*PROMPTS)).logits  # pyright: ignore[reportReturnType]


def saved_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, whatever their shards; no name is in two."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        shard = load_file(path)
        assert not tensors.keys() & shard.keys()
        tensors |= shard
    return tensors


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    small_model().save_pretrained(folder, max_shard_size="100KB")
    return folder


def test_shards_hold_every_weight_once_and_load_again_bit_for_bit(sharded: Path) -> None:
    model = small_model()
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 3
    saved = saved_tensors(sharded)
    assert saved.keys() == index.keys() == model.state_dict().keys()
    again = Phi3VForCausalLM.from_pretrained(sharded)
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    assert torch.equal(logits_of(again), logits_of(model))


@needs_parity
def test_the_recorded_checkpoint_is_written_as_it_was_read(tmp_path: Path) -> None:
    # A folder as it is published, and with the second name for the embedding in the file.
    weights = load_file(PARITY / "model/weights.safetensors")
    source = tmp_path / "source"
    source.mkdir()
    fields = {
        **read_json("model/config.json"),
        "vision_config": read_json("model/vision_config.json"),
    }
    (source / "config.json").write_text(json.dumps(fields))
    embedding = weights["model.embed_tokens.weight"]
    save_file(
        {**weights, WTE: embedding.clone()}, source / "model.safetensors", metadata={"format": "pt"}
    )
    model = Phi3VForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "again", max_shard_size="2MB")
    again = saved_tensors(tmp_path / "again")
    assert again.keys() == weights.keys() - {WTE}
    for name, tensor in again.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, weights[name]), name
    computed = logits_of(model.float())
    assert torch.equal(computed, logits_of(reference_model()))


def test_what_is_never_computed_keeps_its_bits_through_training(tmp_path: Path) -> None:
    small_model(seed=3).save_pretrained(tmp_path / "before")
    model = load_model(tmp_path / "before").train()
    gradients(model, packed_row(*PROMPTS))
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.optim.AdamW(trained, lr=1e-2).step()
    model.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("before", "after"))
    kept = {n for n in before if n.startswith((VISION + "encoder.layers.2.", VISION + "post_lay"))}
    assert len(kept) == 18
    for name in before:
        assert torch.equal(before[name], after[name]) == (name in kept), name


def test_a_missing_weight_is_named_and_an_unknown_one_too(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["model.norm.weight"]
    save_file({**weights, "model.extra.weight": torch.zeros(2)}, path, metadata={"format": "pt"})
    loaded: Any = Phi3VForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    found = loaded[1]
    assert set(found["missing_keys"]) == {"model.norm.weight"}
    assert set(found["unexpected_keys"]) == {"model.extra.weight"}


def test_the_second_name_of_the_embedding_is_no_unexpected_weight(tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    assert WTE not in weights
    save_file({**weights, WTE: weights["lm_head.weight"].clone()}, path, metadata={"format": "pt"})
    loaded: Any = Phi3VForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    again, found = loaded
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_training_loaded_weights_leaves_their_file_alone(sharded: Path) -> None:
    # Weights loaded in the dtype of the file are pages of the file until they are written to.
    before = {path: path.read_bytes() for path in sharded.glob("*.safetensors")}
    model = Phi3VForCausalLM.from_pretrained(sharded)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert not torch.equal(logits_of(model), logits_of(small_model()))


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_a_device_map_changes_no_logit(sharded: Path, device_map: Any) -> None:
    model = Phi3VForCausalLM.from_pretrained(sharded, device_map=device_map)
    assert torch.equal(logits_of(model), logits_of(small_model()))


@pytest.mark.parametrize(
    "on_disk",
    [
        ["model.layers.1"],
        ["model.vision_embed_tokens"],
        ["model.embed_tokens", "model.layers.0", "lm_head"],
        [VISION + "encoder.layers.1", VISION + "embeddings"],
    ],
    ids=["decoder layer", "vision", "embedding, layer, head", "inside vision"],
)
def test_parts_offloaded_to_disk_change_no_logit(
    sharded: Path, on_disk: list[str], tmp_path: Path
) -> None:
    if on_disk[0].startswith(VISION):
        rest = [
            *(VISION + n for n in ("pre_layrnorm", "post_layernorm", "encoder.layers.0")),
            VISION + "encoder.layers.2",
            *(f"model.vision_embed_tokens.{n}" for n in ("glb_GN", "sub_GN", "img_projection")),
        ]
    else:
        rest = ["model.vision_embed_tokens"]
    rest += ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"]
    device_map = {**dict.fromkeys(rest, "cpu"), **dict.fromkeys(on_disk, "disk")}
    model = Phi3VForCausalLM.from_pretrained(
        sharded, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    away = {n for n, p in model.named_parameters() if p.device.type == "meta"}
    assert away
    assert all(name.startswith(tuple(on_disk)) for name in away)
    torch.testing.assert_close(logits_of(model), logits_of(small_model()), atol=1e-6, rtol=0)
    inputs = call_inputs(*PROMPTS)
    settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    expected = small_model().generate(**inputs, **settings)  # pyright: ignore[reportAttributeAccessIssue]
    assert model.generate(**inputs, **settings).tolist() == expected.tolist()  # pyright: ignore[reportAttributeAccessIssue]


def test_an_automatic_map_splits_between_layers_and_never_inside_one() -> None:
    from accelerate import infer_auto_device_map

    with torch.device("meta"):
        model = Phi3VForCausalLM(small_config(num_hidden_layers=6))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    names = [*(model._no_split_modules or ())]
    device_map = infer_auto_device_map(
        model,
        max_memory={0: size // 3, 1: size // 3, "cpu": 2 * size},
        no_split_module_classes=names,
    )
    assert len(set(device_map.values())) > 1
    kinds = {"Phi3VDecoderLayer", "CLIPLayer"}
    whole = [n for n, m in model.named_modules() if type(m).__name__ in kinds]
    assert set(names) == kinds
    assert not [key for key in device_map for name in whole if key.startswith(name + ".")]


def load_memory(folder: Path, output: Path, *doors: str) -> dict[str, Any]:
    chosen = [argument for door in doors for argument in ("--door", door)]
    command = [sys.executable, str(ROOT / "benchmarks/load_memory.py"), "--folder", str(folder)]
    subprocess.run(
        [*command, "--json", str(output), *chosen], check=True, capture_output=True, timeout=600
    )
    return {row["door"]: row for row in json.loads(output.read_text())["results"]}


def test_loading_holds_no_second_copy_of_the_weights(tmp_path: Path) -> None:
    # 100 MB in bfloat16, loaded as float32: no page of the file can be kept.
    config = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 32}
    rope = {"rope_scaling": None, "num_hidden_layers": 10, "vocab_size": 1024}
    model = small_model(**config, **rope).bfloat16()
    model.save_pretrained(tmp_path / "model", max_shard_size="20MB")
    shards = list((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 3
    door = "methods.load_model(dtype=float32)"
    row = load_memory(tmp_path / "model", tmp_path / "memory.json", door)[door]
    num_bytes = sum(p.numel() for p in model.parameters()) * 4
    assert row["weights"] == num_bytes
    assert 0.9 < row["peak_ratio"] < 1.15


@pytest.mark.slow
@pytest.mark.long
def test_every_way_to_load_a_gigabyte_stays_within_the_limit(tmp_path: Path) -> None:
    output = tmp_path / "memory.json"
    script = str(ROOT / "benchmarks/load_memory.py")
    subprocess.run([sys.executable, script, "--json", str(output)], check=True, timeout=1200)
    rows = json.loads(output.read_text())["results"]
    assert len(rows) == 5
    assert all(row["weights"] > 9e8 and row["peak_ratio"] < 1.15 for row in rows)


def test_a_shard_names_its_framework(sharded: Path) -> None:
    # transformers refuses files without it.
    for path in sharded.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata()["format"] == "pt"
