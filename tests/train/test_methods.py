"""What trains under each method, in which dtype, and that all of it gets a gradient."""

from pathlib import Path
from typing import Any

import pytest
import torch
from phi3v_train.config import MethodConfig
from phi3v_train.export import export_adapter, export_model
from phi3v_train.lora import load_adapter
from phi3v_train.methods import choose_precision, load_model, load_to_train, prepare
from phi3v_train.model_parts import part_of
from phi3v_train.modeling_phi3_v import Phi3VForCausalLM
from safetensors.torch import load_file

from tests.train.builders import fresh_model
from tests.train.method_models import (
    LORA,
    MIXED,
    QLORA,
    ROW,
    TEXT_ROW,
    logits_of,
    prepared,
    step,
)
from tests.train.small_models import small_config, small_model

CPU = torch.device("cpu")
METHODS = {
    "full": {"name": "full"},
    "frozen vision": {"name": "full", "freeze": ["vision"]},
    "frozen llm": {"name": "full", "freeze": ["llm"]},
    "frozen llm and vision": {"name": "full", "freeze": ["llm", "vision"]},
    "lora": LORA,
    "lora, frozen vision": {**LORA, "freeze": ["vision"]},
    "lora on vision": {"name": "lora", "lora": {"rank": 4, "targets": ["vision"]}},
    "lora, vision and projector in full": MIXED,
    "lora on vision, llm in full": {"name": "lora", "lora": {"rank": 4, "full": ["llm"]}},
    "qlora": QLORA,
}
KINDS = ("full", "lora", "lora, vision and projector in full", "qlora")
EVERY_METHOD = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
EVERY_KIND = pytest.mark.parametrize("method", [METHODS[kind] for kind in KINDS], ids=KINDS)


def test_full_training_trains_all_but_what_is_never_computed() -> None:
    training = prepared({"name": "full"})
    frozen = {n for n, p in training.model.named_parameters() if not p.requires_grad}
    last = len(training.model.model.vision_embed_tokens.img_processor.vision_model.encoder.layers)
    assert frozen
    assert all(f"encoder.layers.{last - 1}." in n or "post_layernorm" in n for n in frozen)


@pytest.mark.parametrize("part", ["vision", "projector", "llm"])
@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_frozen_part_does_not_train(name: str, part: str) -> None:
    training = prepared({**LORA, "name": name, "freeze": [part]})
    assert {part_of(n) for n in training.trainable} == {"vision", "projector", "llm"} - {part}


def test_adapters_sit_where_the_recipe_puts_them() -> None:
    training = prepared(LORA)
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


def test_a_step_of_lora_changes_adapters_only() -> None:
    training = prepared(LORA)
    before = {n: p.detach().clone() for n, p in training.model.named_parameters()}
    step(training)
    changed = {n for n, p in training.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all("lora_" in name for name in changed)


@EVERY_METHOD
def test_every_tensor_that_trains_gets_a_gradient(method: dict[str, Any]) -> None:
    training = prepared(method)
    assert training.trainable
    step(training, ROW)  # asserts it
    step(training, TEXT_ROW)


@EVERY_KIND
def test_every_tensor_gets_its_gradient_where_activations_are_computed_again(
    method: dict[str, Any],
) -> None:
    again = prepared({**method, "gradient_checkpointing": True})
    plain = prepared(method)
    assert step(again) == step(plain)
    for name, parameter in plain.trainable.items():
        torch.testing.assert_close(again.trainable[name].grad, parameter.grad)


def test_parts_named_in_full_train_their_own_weights_and_the_others_get_adapters() -> None:
    training = prepared(MIXED)
    adapters = {name for name in training.trainable if ".lora_" in name}
    assert {part_of(name) for name in adapters} == {"llm"}
    full = prepared({"name": "full"}).trainable.keys()
    assert training.trainable.keys() - adapters == {n for n in full if part_of(n) != "llm"}


@EVERY_KIND
def test_bf16_on_a_cpu_trains_float32_weights_to_nearly_the_same_loss(
    method: dict[str, Any],
) -> None:
    training = prepared(method, "bf16")
    assert {p.dtype for p in training.trainable.values()} == {torch.float32}
    # 4 bits of weights rounded to bf16 may fall to another level.
    tolerance = 0.1 if method["name"] == "qlora" else 0.03
    assert step(training) == pytest.approx(step(prepared(method)), rel=tolerance)


def test_frozen_weights_under_adapters_take_the_runs_precision() -> None:
    for method, expected in ((LORA, {torch.bfloat16}), ({"name": "full"}, {torch.float32})):
        model = prepared({**method, "freeze": ["vision"]}, "bf16").model
        assert {p.dtype for p in model.parameters() if not p.requires_grad} == expected


@EVERY_METHOD
def test_a_model_without_weights_is_made_ready_alike(method: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = Phi3VForCausalLM(small_config())
    unloaded = prepare(model, MethodConfig.model_validate(method), "bf16")
    assert unloaded.trainable.keys() == prepared(method, "bf16").trainable.keys()


def test_weights_saved_in_bf16_are_loaded_to_train_in_float32(tmp_path: Path) -> None:
    folder = export_model(small_model(), tmp_path, tmp_path / "model", torch.bfloat16)
    saved = load_file(folder / "model.safetensors")
    full = load_to_train(folder, MethodConfig(), "fp32")
    assert {p.dtype for p in full.model.parameters()} == {torch.float32}
    assert all(torch.equal(p, saved[n].float()) for n, p in full.model.named_parameters())
    lora = load_to_train(folder, MethodConfig.model_validate(LORA), "bf16")
    assert {p.dtype for p in lora.trainable.values()} == {torch.float32}
    assert lora.model.lm_head.weight.dtype == torch.bfloat16


def test_fp16_on_a_cpu_is_refused_and_auto_is_fp32() -> None:
    with pytest.raises(ValueError, match="on a CPU use precision=fp32 or bf16"):
        choose_precision("fp16", CPU)
    assert choose_precision("auto", CPU) == "fp32"


def test_an_adapter_folder_holds_adapters_and_gives_the_model_that_was_trained(
    tmp_path: Path,
) -> None:
    training = prepared(LORA)
    step(training)
    folder = export_adapter(training.adapters, tmp_path, tmp_path / "adapter")
    # PEFT would store the frozen head too, beside its adapter.
    assert all("lora_" in name for name in load_file(folder / "adapter_model.safetensors"))
    expected = logits_of(training.model)
    assert torch.equal(logits_of(load_adapter(small_model(), folder)), expected)
    assert not torch.equal(logits_of(small_model()), expected)


def test_folders_that_are_no_model_or_adapter_are_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not a model folder: it has no config\.json"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="is not an adapter folder"):
        load_adapter(fresh_model(tiny), tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="expected model_type phi3_v, got 'llama'"):
        load_model(tmp_path)
