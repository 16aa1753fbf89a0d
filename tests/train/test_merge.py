"""Adapters added into their base: the same answers, without PEFT."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from phi3v_train.config import LoraConfig, MethodConfig
from phi3v_train.export import SIDE_FILES, export_adapter, tensor_names
from phi3v_train.export_checkpoint import export_checkpoint
from phi3v_train.lora import load_adapter
from phi3v_train.merge import merge
from phi3v_train.methods import load_model, load_to_train, move, prepare
from phi3v_train.modeling_phi3_v import Phi3VForCausalLM
from phi3v_train.probe import largest_difference, probe
from phi3v_train.trainer import train
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.train.builders import toy_config

LORA = MethodConfig(name="lora", lora=LoraConfig(rank=4))


def write_adapter(base: Path, folder: Path, method: MethodConfig = LORA, seed: int = 0) -> Path:
    """An adapter that changes the answers: all that trains is shaken."""
    training = load_to_train(base, method, "fp32")
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in training.trainable.values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return export_adapter(training.adapters, base, folder)


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tiny, tmp_path_factory.mktemp("lora") / "adapter")


@pytest.fixture(scope="module")
def half_base(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model saved in bfloat16, as the published one is."""
    folder = tmp_path_factory.mktemp("half") / "base"
    shutil.copytree(tiny, folder)
    model = load_model(tiny)
    move(model, torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def test_a_merged_model_answers_as_the_base_with_its_adapters(
    tiny: Path, adapter: Path, tmp_path: Path
) -> None:
    merged = merge(adapter, tmp_path / "merged", check=True)
    with_adapters = load_adapter(load_model(tiny), adapter)
    expected = probe(with_adapters)
    found = probe(load_model(merged.path))
    assert largest_difference(expected, found) < 1e-5
    assert largest_difference(expected, probe(load_model(tiny))) > 1e-2
    assert merged.difference < 1e-5
    assert "read again and found equal" in str(merged)


def test_a_merged_folder_has_the_names_and_side_files_of_its_base(
    tiny: Path, adapter: Path, tmp_path: Path
) -> None:
    merged = merge(adapter, tmp_path / "merged")
    assert tensor_names(merged.path) == tensor_names(tiny)
    for name in SIDE_FILES:
        assert (merged.path / name).exists() == (tiny / name).exists()
    assert AutoTokenizer.from_pretrained(merged.path)("What is it?")["input_ids"]
    assert "lora" not in json.dumps(json.loads((merged.path / "config.json").read_text()))


def test_sums_are_made_in_float32_and_saved_in_the_dtype_of_the_base(
    half_base: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(half_base, tmp_path / "adapter")
    merged = merge(adapter, tmp_path / "merged", check=True)
    assert merged.dtype is torch.bfloat16
    weights = load_file(merged.path / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    name = "model.layers.0.self_attn.qkv_proj"
    lora = load_file(adapter / "adapter_model.safetensors")
    a, b = (lora[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    before = load_file(half_base / "model.safetensors")[f"{name}.weight"].float()
    scale = LORA.lora.lora_alpha / LORA.lora.rank
    assert torch.equal(weights[f"{name}.weight"], (before + scale * (b @ a)).bfloat16())
    assert 0 < merged.difference_as_saved < 0.1


def test_a_part_that_trained_in_full_beside_the_adapters_is_merged_too(
    tiny: Path, tmp_path: Path
) -> None:
    method = MethodConfig(name="lora", lora=LoraConfig(rank=4, targets=("llm",), full=("vision",)))
    adapter = write_adapter(tiny, tmp_path / "adapter", method)
    merged = merge(adapter, tmp_path / "merged", check=True)
    name = "model.vision_embed_tokens.img_processor.vision_model.embeddings.patch_embedding.weight"
    before, after = (load_file(f / "model.safetensors")[name] for f in (tiny, merged.path))
    assert not torch.equal(before, after)


def test_adapters_trained_over_4_bits_are_added_to_the_base_as_it_was_saved(
    tiny: Path, toy_shards: Path, tmp_path: Path
) -> None:
    train(toy_config(tiny, toy_shards, tmp_path / "run", "method.name=qlora", "train.max_steps=2"))
    merged = merge(tmp_path / "run", tmp_path / "merged", check=True)
    exported = export_checkpoint(tmp_path / "run", tmp_path / "exported", check=True)
    expected = probe(load_adapter(load_model(tiny), tmp_path / "run" / "adapter"))
    assert largest_difference(expected, probe(load_model(merged.path))) < 1e-5
    assert largest_difference(expected, probe(load_model(tiny))) > 1e-4
    files = [load_file(out / "model.safetensors") for out in (merged.path, exported.path)]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


@pytest.mark.parametrize("method", ["full", "merged"])
def test_a_run_that_trained_adapters_may_be_named_instead_of_its_adapter_folder(
    adapter: Path, tmp_path: Path, method: str
) -> None:
    assert merge(adapter.parent, tmp_path / method).path == tmp_path / method


def test_an_adapter_folder_loads_with_peft_alone(tiny: Path, adapter: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    assert isinstance(base, Phi3VForCausalLM)
    adapted = peft.PeftModel.from_pretrained(base, str(adapter))
    found = probe(adapted.get_base_model())  # pyright: ignore[reportArgumentType]
    expected = probe(load_adapter(load_model(tiny), adapter))
    assert torch.equal(found, expected)


def test_a_base_that_is_not_where_the_adapter_says_is_named_with_the_way_out(
    tiny: Path, adapter: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "adapter"
    shutil.copytree(adapter, moved)
    settings = json.loads((moved / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "elsewhere/model"
    (moved / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"trained on elsewhere/model, .* with --model"):
        merge(moved, tmp_path / "merged")
    assert merge(moved, tmp_path / "merged", model=tiny).base == tiny


def test_what_is_no_adapter_and_what_exists_already_are_refused(
    tiny: Path, adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="is not an adapter folder"):
        merge(tiny, tmp_path / "merged")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="exists already"):
        merge(adapter, tmp_path)
    assert not (tmp_path / "merged").exists()


def test_an_adapter_that_is_not_a_number_is_refused_before_anything_is_written(
    tiny: Path, adapter: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "adapter"
    shutil.copytree(adapter, broken)
    weights = load_file(broken / "adapter_model.safetensors")
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, broken / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"(?i)nan"):
        merge(broken, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_probe_sees_every_part_of_the_model(tiny: Path) -> None:
    model = load_model(tiny)
    expected = probe(model)
    assert torch.equal(probe(model), expected)
    training = prepare(model, MethodConfig(), "fp32")
    blind = {
        name
        for name in (
            "model.vision_embed_tokens.img_processor.vision_model.embeddings.patch_embedding.weight",
            "model.vision_embed_tokens.img_projection.0.weight",
            "model.vision_embed_tokens.glb_GN",
            "model.vision_embed_tokens.sub_GN",
            "model.layers.1.mlp.down_proj.weight",
            "lm_head.weight",
        )
        if not _is_seen(model, training.trainable[name], expected)
    }
    assert blind == set()


def _is_seen(model: Phi3VForCausalLM, weight: torch.nn.Parameter, expected: torch.Tensor) -> bool:
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(-1.5)
        seen = not torch.equal(probe(model), expected)
        weight.copy_(kept)
    return seen
