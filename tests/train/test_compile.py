"""`layer.compile()`: equal results, one compilation for all layers and lengths."""

from typing import Any

import pytest
import torch
from phi3v_train.modeling_phi3_v import Phi3VForCausalLM
from torch import nn
from torch._dynamo.utils import counters

from tests.train.small_models import Prompt, call_inputs, gradients, packed_row, small_model

ROWS = [
    packed_row(Prompt(12, ((1, 1),), seed=1), Prompt(10, seed=2), Prompt(9, ((1, 2),), seed=3)),
    packed_row(Prompt(30, ((1, 1), (1, 1)), seed=4)),
    packed_row(Prompt(11, ((2, 1),), seed=5), Prompt(17, seed=6)),
    packed_row(Prompt(20, seed=7), Prompt(7, seed=8), Prompt(8, seed=9), Prompt(50, seed=10)),
]
BACKENDS = pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.long])]
)


def compile_layers(model: Phi3VForCausalLM, backend: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    tower: Any = model.model.vision_embed_tokens.img_processor.vision_model
    for layer in [*model.model.layers, *tower.encoder.layers[:-1]]:
        assert isinstance(layer, nn.Module)
        layer.compile(backend=backend, dynamic=True)


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


@BACKENDS
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_compiled_layers_give_equal_losses_and_gradients(backend: str, checkpointing: bool) -> None:
    expected = [gradients(small_model().train(), row) for row in ROWS]
    model = small_model().train()
    model.model.gradient_checkpointing = checkpointing
    model.model.vision_embed_tokens.img_processor.vision_model.gradient_checkpointing = (
        checkpointing
    )
    compile_layers(model, backend)
    for row, (loss, grads) in zip(ROWS, expected, strict=True):
        found_loss, found = gradients(model, row)
        torch.testing.assert_close(found_loss, loss, atol=1e-5, rtol=1e-5)
        assert found.keys() == grads.keys()
        for name, gradient in grads.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)


def test_many_layers_and_lengths_are_compiled_once() -> None:
    # More layers than dynamo compiles one function again for (8): they must share their graphs.
    model = small_model(num_hidden_layers=12).train()
    compile_layers(model, "aot_eager")
    gradients(model, ROWS[0])
    first = num_graphs()
    # Of a vision layer one; of a decoder layer one before and one after the attention, which is
    # the one planned break.
    assert first <= 6
    for row in ROWS[1:]:
        gradients(model, row)
    assert num_graphs() == first
    reasons = [reason for reason in counters["graph_break"] if "compiler.disable" not in reason]
    assert not reasons


@BACKENDS
def test_compiled_layers_generate_the_same_tokens(backend: str) -> None:
    prompts = [Prompt(12, ((1, 1),), seed=1), Prompt(10, seed=2)]
    settings: dict[str, Any] = {
        "max_new_tokens": 8,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    plain: Any = small_model().generate(  # pyright: ignore[reportAttributeAccessIssue]
        **call_inputs(*prompts), **settings
    )
    model: Any = small_model()
    compile_layers(model, backend)
    compiled = model.generate(**call_inputs(*prompts), **settings)
    assert compiled.sequences.tolist() == plain.sequences.tolist()
    torch.testing.assert_close(
        torch.stack(compiled.logits), torch.stack(plain.logits), atol=1e-5, rtol=1e-5
    )
    before = num_graphs()
    again = model.generate(**call_inputs(*prompts), **{**settings, "max_new_tokens": 16})
    assert num_graphs() == before
    assert again.sequences[:, : plain.sequences.shape[1]].tolist() == plain.sequences.tolist()
