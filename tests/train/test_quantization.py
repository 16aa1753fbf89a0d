"""bitsandbytes, 4 and 8 bits: what becomes what, how far the logits move, and QLoRA.

Both run on a CPU (bitsandbytes has kernels for it: 8-bit rounds activations to float16 first).
Distances are of logits, relative to the unquantised model's (norm of the difference / norm). They
are what the formats cost on random weights of width 64, not what they cost on trained ones.
"""

from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from phi3v_train.modeling_phi3_v import Phi3VForCausalLM
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from tests.train.small_models import Prompt, call_inputs, packed_row, small_model

PROMPTS = [Prompt(12, ((1, 2),), seed=1), Prompt(10, (), seed=2)]
IN_PLACE = ["lm_head", "model.vision_embed_tokens"]
"""What a careful user leaves out: the head and all of the vision side. transformers leaves the
head out by itself, but only while no list is given."""

FOUR = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.float32,
}
EIGHT = {"load_in_8bit": True}
BITS = pytest.mark.parametrize(
    ("settings", "kind", "distance"),
    [(FOUR, Linear4bit, 0.35), (EIGHT, Linear8bitLt, 0.05)],
    ids=["4 bits", "8 bits"],
)
# bitsandbytes says at every product that it rounds.
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    small_model().save_pretrained(folder)
    return folder


def quantised(folder: Path, settings: dict[str, Any], **more: Any) -> Any:
    config = BitsAndBytesConfig(**settings)
    model = Phi3VForCausalLM.from_pretrained(folder, quantization_config=config, **more).eval()
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    return model


def logits_of(model: Any) -> Tensor:
    """Of the real tokens of both prompts."""
    inputs = call_inputs(*PROMPTS)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()].float().cpu()


def distance_of(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def linears(model: nn.Module, kind: type[nn.Module]) -> set[str]:
    return {name for name, module in model.named_modules() if type(module) is kind}


@BITS
def test_linear_layers_are_quantised_but_the_head(
    folder: Path, settings: dict[str, Any], kind: type[nn.Module], distance: float
) -> None:
    del distance
    model = quantised(folder, settings)
    assert linears(model, kind) == linears(small_model(), nn.Linear) - {"lm_head"}
    assert linears(model, nn.Linear) == {"lm_head"}


@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_stay_near_the_unquantised_ones(
    folder: Path,
    settings: dict[str, Any],
    kind: type[nn.Module],
    distance: float,
    dtype: torch.dtype,
) -> None:
    del kind
    expected = logits_of(small_model())
    found = distance_of(logits_of(quantised(folder, settings, dtype=dtype)), expected)
    assert 1e-3 < found < distance


@BITS
def test_the_vision_side_can_be_left_as_it_is(
    folder: Path, settings: dict[str, Any], kind: type[nn.Module], distance: float
) -> None:
    model = quantised(folder, {**settings, "llm_int8_skip_modules": IN_PLACE})
    decoder = {n for n in linears(small_model(), nn.Linear) if n.startswith("model.layers.")}
    assert linears(model, kind) == decoder
    crops = PROMPTS[0].crops.float()[:, :, :336, :336] / 255
    grid = [(1, 2)]
    with torch.no_grad():
        seen = model.model.vision_embed_tokens(crops[:1], crops, grid)
        plain: Any = small_model()
        plain = plain.model.vision_embed_tokens(crops[:1], crops, grid)
    assert torch.equal(seen, plain)
    assert distance_of(logits_of(model), logits_of(small_model())) < distance


def test_4_bits_compute_with_the_weights_they_stand_for(folder: Path) -> None:
    # Exact but for rounding: the distance above is the format's, not the model's.
    expected = logits_of(quantised(folder, FOUR))
    plain = quantised(folder, FOUR)
    PreTrainedModel.dequantize(plain)
    assert not linears(plain, Linear4bit)
    torch.testing.assert_close(logits_of(plain), expected, atol=1e-4, rtol=0)


@BITS
def test_a_quantised_model_answers_and_takes_images_along(
    folder: Path, settings: dict[str, Any], kind: type[nn.Module], distance: float
) -> None:
    del kind, distance
    model = quantised(folder, settings)
    inputs = call_inputs(*PROMPTS)
    start = inputs["input_ids"].shape[1]
    greedy = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert greedy.shape == (2, start + 4)
    with torch.no_grad():
        alone = [model(**call_inputs(prompt)).logits[0, -1].argmax() for prompt in PROMPTS]
    assert greedy[:, start].tolist() == alone
    assert model.generate(**inputs, max_new_tokens=2, num_beams=2).shape == (2, start + 2)


@BITS
def test_a_quantised_folder_loads_again_as_it_was(
    folder: Path, settings: dict[str, Any], kind: type[nn.Module], distance: float, tmp_path: Path
) -> None:
    del distance
    model = quantised(folder, settings)
    model.save_pretrained(tmp_path)
    again = Phi3VForCausalLM.from_pretrained(tmp_path).eval()
    assert linears(again, kind) == linears(model, kind)
    assert torch.equal(logits_of(again), logits_of(model))


@BITS
@pytest.mark.parametrize(
    # bfloat16 products are slow on a CPU without them.
    "dtype",
    [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)],
)
def test_adapters_learn_on_a_quantised_base(
    folder: Path,
    settings: dict[str, Any],
    kind: type[nn.Module],
    distance: float,
    dtype: torch.dtype,
) -> None:
    del distance
    if "bnb_4bit_compute_dtype" in settings:
        settings = {**settings, "bnb_4bit_compute_dtype": dtype}
    base = quantised(folder, settings, dtype=dtype)
    base = peft.prepare_model_for_kbit_training(base)  # with gradient checkpointing
    lora = peft.LoraConfig(
        r=4,
        target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "q_proj", "fc1"],
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    model = cast("Any", peft.get_peft_model(base, lora)).train()
    frozen = {
        name: cast("Tensor", module.weight).detach().clone()
        for name, module in model.named_modules()
        if type(module) is kind
    }
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    row = packed_row(Prompt(12, ((1, 1),), seed=1), PROMPTS[1])
    losses: list[float] = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model.get_base_model().packed_loss(row)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    never = "vision_model.encoder.layers.2."
    for name, weight in model.named_parameters():
        if weight.requires_grad and never not in name:
            assert weight.grad is not None, name
            assert bool(weight.grad.isfinite().all()), name
    for name, module in model.named_modules():
        if name in frozen:
            assert torch.equal(module.weight, frozen[name]), name


@pytest.mark.gpu
@BITS
def test_a_gpu_gives_the_logits_of_the_cpu(
    folder: Path, settings: dict[str, Any], kind: type[nn.Module], distance: float
) -> None:
    del kind
    if "bnb_4bit_compute_dtype" in settings:
        settings = {**settings, "bnb_4bit_compute_dtype": torch.float16}
    model = quantised(folder, settings, dtype=torch.float16, device_map={"": 0})
    assert model.device.type == "cuda"
    assert distance_of(logits_of(model), logits_of(small_model())) < distance
    on_cpu = quantised(folder, {**settings}, dtype=torch.float32, device_map={"": "cpu"})
    assert distance_of(logits_of(model), logits_of(on_cpu)) < 0.05
