"""4-bit decoders and 8-bit moments. How far logits move is in test_quantization.py."""

from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from phi3v_train.config import MethodConfig
from phi3v_train.methods import prepare
from phi3v_train.modeling_phi3_v import Phi3VForCausalLM
from torch import nn

from tests.train.method_models import LORA, QLORA, TEXT_ROW, logits_of, prepared, step
from tests.train.small_models import small_config, small_model


def four_bits(model: nn.Module) -> dict[str, Linear4bit]:
    return {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if type(module) is Linear4bit
    }


def test_the_decoders_linear_layers_are_kept_in_4_bits_and_nothing_else() -> None:
    training = prepared(QLORA)
    layers = four_bits(training.model)
    decoder = {
        name
        for name, module in small_model().named_modules()
        if isinstance(module, nn.Linear) and name.startswith("model.layers.")
    }
    assert layers.keys() == decoder
    for layer in layers.values():
        assert isinstance(layer.weight, Params4bit)
        weight: Any = layer.weight
        assert weight.bnb_quantized
        assert weight.quant_state.quant_type == "nf4"
        assert weight.quant_state.nested  # the scales are quantised too
        assert weight.numel() == layer.in_features * layer.out_features / 2
        assert not weight.requires_grad


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_products_with_4_bit_weights_are_in_the_runs_precision(precision: Any) -> None:
    training = prepared(QLORA, precision)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert {layer.compute_dtype for layer in four_bits(training.model).values()} == {dtype}
    assert {p.dtype for p in training.trainable.values()} == {torch.float32}
    assert training.model.lm_head.weight.dtype == dtype
    assert step(training) == pytest.approx(step(prepared(LORA)), rel=0.1)


def test_adapters_learn_over_4_bits_which_stay_as_they_are() -> None:
    training = prepared(QLORA)
    before = {n: p.detach().clone() for n, p in training.model.named_parameters()}
    losses = [step(training, rate=3e-3) for _ in range(5)]
    assert losses[-1] < 0.9 * losses[0]
    assert step(training, TEXT_ROW) > 0
    changed = {n for n, p in training.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == training.trainable.keys()


def test_the_model_starts_near_the_whole_one() -> None:
    whole = logits_of(small_model())
    distance = float((logits_of(prepared(QLORA).model) - whole).norm() / whole.norm())
    assert 1e-3 < distance < 0.35


def test_parameters_are_counted_alike_in_4_bits_whole_and_unloaded() -> None:
    method = MethodConfig.model_validate(QLORA)
    with torch.device("meta"):
        model = Phi3VForCausalLM(small_config())
    unloaded = prepare(model, method, "fp32")
    expected = prepared(LORA)
    for training in (unloaded, prepared(QLORA)):
        assert training.num_parameters == expected.num_parameters
        assert training.trainable.keys() == expected.trainable.keys()


def test_a_width_that_is_no_multiple_of_a_block_is_refused() -> None:
    method = MethodConfig.model_validate(QLORA)
    with pytest.raises(ValueError, match=r"down_proj has 96 inputs, .* a multiple of 64"):
        prepare(small_model(intermediate_size=96), method, "fp32")


def test_vision_trains_in_full_beside_a_4_bit_decoder() -> None:
    training = prepared({"name": "qlora", "lora": {"rank": 4, "full": ["vision"]}}, "bf16")
    vision = {n: p for n, p in training.trainable.items() if ".img_processor." in n}
    assert vision
    assert not any(".lora_" in name for name in vision)
    assert {p.dtype for p in training.trainable.values()} == {torch.float32}
    before = {name: p.detach().clone() for name, p in vision.items()}
    step(training)
    assert all(not torch.equal(p, before[name]) for name, p in vision.items())
