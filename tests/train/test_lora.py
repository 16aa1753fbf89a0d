"""Adapters: their settings, and folders that give back what was trained."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from phi3v_train.config import MethodConfig
from phi3v_train.lora import WEIGHTS_FILE, adapter_weights, load_adapter, save_adapter
from phi3v_train.methods import TrainingModel, prepare
from phi3v_train.model_parts import part_of
from safetensors.torch import load_file, save_file

from tests.train.method_models import LORA, MIXED, QLORA, logits_of, prepared, step
from tests.train.small_models import small_model

# PEFT asks for a property of the model that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def with_extra(**extra: Any) -> dict[str, Any]:
    return {"name": "lora", "lora": {"rank": 4, "extra": extra}}


def trained(method: dict[str, Any]) -> TrainingModel:
    training = prepared(method)
    step(training)
    return training


def test_parts_that_train_in_full_are_saved_beside_the_adapters(tmp_path: Path) -> None:
    training = trained(MIXED)
    own = {name for name in training.trainable if ".lora_" not in name}
    assert {part_of(name) for name in own} == {"vision", "projector"}
    assert "model.vision_embed_tokens.sub_GN" in own  # a bare parameter, in no module of its own
    save_adapter(training.adapters, tmp_path)
    saved = load_file(tmp_path / WEIGHTS_FILE)
    assert {f"base_model.model.{name}" for name in own} <= saved.keys()
    assert len(saved) == len(training.trainable)


@pytest.mark.parametrize(
    "method",
    [LORA, MIXED, with_extra(use_dora=True), with_extra(use_rslora=True, bias="lora_only")],
    ids=["adapters", "vision in full", "DoRA", "biases"],
)
@pytest.mark.parametrize("way", ["ours", "PEFT's", "merged"])
def test_a_saved_folder_gives_the_model_that_was_trained(
    method: dict[str, Any], way: str, tmp_path: Path
) -> None:
    training = trained(method)
    save_adapter(training.adapters, tmp_path)
    expected = logits_of(training.model)
    base: Any = small_model()
    assert float((logits_of(base) - expected).abs().max()) > 0.1
    if way == "ours":
        assert torch.equal(logits_of(load_adapter(base, tmp_path)), expected)
        return
    again = peft.PeftModel.from_pretrained(base, str(tmp_path))
    if way == "PEFT's":
        assert torch.equal(logits_of(again), expected)
    else:
        merged = logits_of(again.merge_and_unload())  # pyright: ignore[reportCallIssue]
        torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-5)


def test_adapters_of_the_4_bit_model_go_on_the_whole_one(tmp_path: Path) -> None:
    training = trained(QLORA)
    save_adapter(training.adapters, tmp_path)
    again = logits_of(load_adapter(small_model(), tmp_path))
    here, plain = logits_of(training.model), logits_of(small_model())
    # Nearer to what was trained than the base is: the rest is what 4 bits cost.
    assert float((again - here).norm()) < 0.5 * float((plain - here).norm())


def test_weights_that_come_from_elsewhere_are_saved_in_place_of_the_models_own() -> None:
    training = trained(MIXED)
    zeros = {name: torch.zeros_like(p) for name, p in training.trainable.items()}
    saved = adapter_weights(training.adapters, zeros)
    assert saved.keys() == adapter_weights(training.adapters).keys()
    assert not any(bool(tensor.any()) for tensor in saved.values())


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    save_adapter(trained(MIXED).adapters, tmp_path)
    with pytest.raises(ValueError, match="does not fit the model"):
        load_adapter(small_model(intermediate_size=192), tmp_path)
    weights = load_file(tmp_path / WEIGHTS_FILE)
    weights["base_model.model.model.another.weight"] = torch.zeros(1)
    save_file(weights, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=r"has no base_model\.model\.model\.another\.weight"):
        load_adapter(small_model(), tmp_path)


def test_more_fields_of_peft_reach_it(tmp_path: Path) -> None:
    extra = {"use_rslora": True, "init_lora_weights": "orthogonal", "exclude_modules": ["lm_head"]}
    training = prepared(with_extra(**extra))
    assert not any(name.startswith("lm_head.lora") for name in training.trainable)
    save_adapter(training.adapters, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["use_rslora"] is True
    assert settings["init_lora_weights"] == "orthogonal"
    assert settings["inference_mode"] is True
    assert (settings["r"], settings["lora_alpha"]) == (4, 8)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"use_rslorra": True}, r"PEFT .* has no use_rslorra; did you mean use_rslora\?"),
        ({"zzzzz": True}, "has no zzzzz; see its LoraConfig"),
        ({"r": 8}, r"r is set by method\.lora\.rank; use that"),
        ({"modules_to_save": ["x"]}, r"is set by method\.lora\.full"),
        ({"task_type": "SEQ_CLS"}, "can't be set, it is not a matter of training"),
        ({"init_lora_weights": "pissa"}, "'pissa' changes the base; expected one of true, false"),
        ({"bias": "some"}, "PEFT says: .*bias"),
        ({"exclude_modules": ".*"}, "PEFT says: "),
    ],
)
def test_fields_that_peft_lacks_or_that_have_a_key_here_are_refused(
    extra: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=rf"^method\.lora\.extra.*{reason}"):
        prepared(with_extra(**extra))


@pytest.mark.parametrize("targets", [["vision"], ["vision", "llm"]])
def test_a_part_without_a_layer_that_takes_an_adapter_is_refused(targets: list[str]) -> None:
    one_layer = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    model = small_model(vision_config={**one_layer, "num_attention_heads": 2})
    method = MethodConfig.model_validate({"name": "lora", "lora": {"targets": targets}})
    with pytest.raises(ValueError, match=r"lora\.targets: vision has no layer that takes an"):
        prepare(model, method, "fp32")


def test_first_weights_follow_the_seed() -> None:
    def first(seed: int) -> torch.Tensor:
        method = MethodConfig.model_validate(LORA)
        training = prepare(small_model(), method, "fp32", seed=seed)
        return next(p for n, p in training.trainable.items() if ".lora_A." in n)

    assert torch.equal(first(3), first(3))
    assert not torch.equal(first(3), first(4))
