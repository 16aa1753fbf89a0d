from pathlib import Path
from typing import Any

import pytest
import torch
from phi3v_train.collator import Batch, collate
from phi3v_train.config import MethodConfig, OptimConfig
from phi3v_train.export import export_adapter
from phi3v_train.lora import load_adapter
from phi3v_train.methods import (
    TrainingModel,
    choose_precision,
    load_model,
    prepare,
)
from phi3v_train.model_parts import part_of
from phi3v_train.optimizer import make_optimizer
from safetensors.torch import load_file

from tests.train.builders import fresh_model, open_toy

CPU = torch.device("cpu")
LORA = {"name": "lora", "lora": {"rank": 4}}


def prepared(folder: Path, precision: Any = "fp32", **method: Any) -> TrainingModel:
    return prepare(load_model(folder), MethodConfig.model_validate(method), precision)


@pytest.fixture(scope="module")
def row(tiny: Path, toy_shards: Path) -> Batch:
    encoder, reader = open_toy(tiny, toy_shards)
    return collate([encoder(r.sample, r.images) for r in (reader[0], reader[1], reader[2])])


def step(training: TrainingModel, row: Batch, rate: float = 1e-2) -> float:
    """One update; every tensor that trains must get a gradient."""
    optimizer = make_optimizer(training.trainable, OptimConfig(learning_rate=rate))
    dtype = training.autocast_dtype
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        loss = training.model.train().packed_loss(row)
    (loss / row.num_label_tokens).backward()
    assert [name for name, p in training.trainable.items() if p.grad is None] == []
    optimizer.step()
    return float(loss.detach())


def test_full_training_trains_all_but_what_is_never_computed(tiny: Path) -> None:
    training = prepared(tiny)
    frozen = {n for n, p in training.model.named_parameters() if not p.requires_grad}
    last = len(training.model.model.vision_embed_tokens.img_processor.vision_model.encoder.layers)
    assert frozen
    assert all(f"encoder.layers.{last - 1}." in n or "post_layernorm" in n for n in frozen)


@pytest.mark.parametrize("part", ["vision", "projector", "llm"])
@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_frozen_part_does_not_train(tiny: Path, name: str, part: str) -> None:
    training = prepared(tiny, **{**LORA, "name": name, "freeze": [part]})
    assert {part_of(n) for n in training.trainable} == {"vision", "projector", "llm"} - {part}


def test_adapters_sit_where_the_recipe_puts_them(tiny: Path) -> None:
    training = prepared(tiny, **LORA)
    assert all("lora_" in name for name in training.trainable)
    modules = {name.split(".lora_")[0] for name in training.trainable}
    layers = training.model.model.vision_embed_tokens.img_processor.vision_model.encoder.layers
    vision = "model.vision_embed_tokens.img_processor.vision_model.encoder.layers"
    expected = {"lm_head", *(f"model.vision_embed_tokens.img_projection.{k}" for k in (0, 2))}
    for k in range(len(training.model.model.layers)):
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
            expected.add(f"model.layers.{k}.{name}")
    for k in range(len(layers) - 1):
        expected |= {f"{vision}.{k}.self_attn.{n}_proj" for n in ("q", "k", "v", "out")}
        expected |= {f"{vision}.{k}.mlp.fc1", f"{vision}.{k}.mlp.fc2"}
    assert modules == expected


def test_a_step_of_lora_changes_adapters_only(tiny: Path, row: Batch) -> None:
    training = prepared(tiny, **LORA)
    before = {n: p.detach().clone() for n, p in training.model.named_parameters()}
    step(training, row)
    changed = {n for n, p in training.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all("lora_" in name for name in changed)


@pytest.mark.parametrize("method", [{"name": "full"}, LORA])
def test_bf16_on_a_cpu_trains_a_step(tiny: Path, row: Batch, method: dict) -> None:
    training = prepared(tiny, "bf16", **method)
    assert {p.dtype for p in training.trainable.values()} == {torch.float32}
    assert step(training, row) == pytest.approx(step(prepared(tiny, **method), row), rel=0.02)


def test_fp16_on_a_cpu_is_refused_and_auto_is_fp32() -> None:
    with pytest.raises(ValueError, match="on a CPU use precision=fp32 or bf16"):
        choose_precision("fp16", CPU)
    assert choose_precision("auto", CPU) == "fp32"


def test_an_adapter_folder_gives_the_model_that_was_trained(
    tiny: Path, row: Batch, tmp_path: Path
) -> None:
    training = prepared(tiny, **LORA)
    step(training, row)
    folder = export_adapter(training.adapters, tiny, tmp_path / "adapter")
    # PEFT would store the frozen head too, beside its adapter.
    assert all("lora_" in name for name in load_file(folder / "adapter_model.safetensors"))
    again = load_adapter(fresh_model(tiny), folder)
    plain = fresh_model(tiny)
    ids = row.input_ids[: int(row.cu_seqlens[1])][None]
    with torch.inference_mode():
        expected = training.model.eval()(input_ids=ids).logits
        assert torch.equal(again.eval()(input_ids=ids).logits, expected)
        assert not torch.equal(plain(input_ids=ids).logits, expected)


def test_folders_that_are_no_model_or_adapter_are_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not a model folder: it has no config\.json"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="is not an adapter folder"):
        load_adapter(fresh_model(tiny), tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="expected model_type phi3_v, got 'llama'"):
        load_model(tmp_path)
