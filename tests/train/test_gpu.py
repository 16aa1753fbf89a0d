"""What only a GPU can show: the kernels, half precision in them, quantised weights on the device.

    uv run pytest -m gpu tests/train/test_gpu.py

Small random models; the same numbers are computed in float32 on the CPU and are the measure. TF32
is off, as it is for every comparison with the reference.
"""

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from phi3v_train import attention
from phi3v_train.config import MethodConfig, OptimConfig
from phi3v_train.methods import move, prepare
from phi3v_train.modeling_phi3_v import Phi3VForCausalLM, normalize_views
from phi3v_train.optimizer import make_optimizer
from phi3v_train.trainer import train
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.train.builders import log_lines, losses_of, toy_config
from tests.train.method_models import LORA, MIXED, QLORA, prepared, step
from tests.train.parity import model_inputs, needs_parity, read_case, reference_model
from tests.train.small_models import Prompt, call_inputs, packed_row, small_model

DEVICE = torch.device("cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Relative, a few units in the last of 11 and 8 bits."""

ROW = (
    Prompt(30, ((1, 2),), seed=1),  # beyond the limit of the short rotary factors
    Prompt(40, (), seed=2),
    Prompt(20, ((1, 1),), seed=3),
)


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    settings: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [setting.allow_tf32 for setting in settings]
    for setting in settings:
        setting.allow_tf32 = False
    yield
    for setting, value in zip(settings, before, strict=True):
        setting.allow_tf32 = value


@pytest.fixture
def with_varlen_kernel() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the varlen kernel needs compute capability 8.0")


class CountSdpa(TorchFunctionMode):
    """How often torch's scaled dot product attention is called."""

    count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self.count += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    expected = expected.double().cpu()
    return float((actual.double().cpu() - expected).norm() / expected.norm())


# --- the kernels ----------------------------------------------------------------------------------


def row_of_states(head_dim: int, key_heads: int) -> tuple[list[Tensor], Tensor, int]:
    lengths = [1, 130, 7, 300, 64]
    generator = torch.Generator().manual_seed(head_dim)
    total = sum(lengths)
    states = [
        torch.randn(total, heads, head_dim, generator=generator)
        for heads in (8, key_heads, key_heads)
    ]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return states, bounds, max(lengths)


def with_gradients(
    states: list[Tensor], bounds: Tensor, longest: int, implementation: str
) -> list[Tensor]:
    """The attended values and the gradients of query, key and value."""
    leaves = [x.detach().requires_grad_() for x in states]
    attended = attention.varlen(
        leaves[0], leaves[1], leaves[2], bounds, longest, implementation=implementation
    )
    weights = torch.linspace(-1, 1, attended.numel(), device=attended.device)
    (attended.float().flatten() * weights).sum().backward()
    return [attended.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.usefixtures("with_varlen_kernel")
@HALF
@pytest.mark.parametrize("key_heads", [8, 2])
@pytest.mark.parametrize("head_dim", [16, 64, 96])
@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2"])
def test_a_varlen_kernel_equals_attention_by_segments(
    implementation: str, head_dim: int, key_heads: int, dtype: torch.dtype
) -> None:
    if implementation == "flash_attention_2":
        pytest.importorskip("flash_attn")
    states, bounds, longest = row_of_states(head_dim, key_heads)
    # The measure starts from the rounded values: only the kernel's own error is left.
    rounded = [x.to(dtype) for x in states]
    expected = with_gradients([x.float() for x in rounded], bounds, longest, "sdpa")
    with CountSdpa() as calls:
        actual = with_gradients(
            [x.to(DEVICE) for x in rounded], bounds.to(DEVICE), longest, implementation
        )
    assert calls.count == 0
    assert len(actual) == 4
    for ours, measure in zip(actual, expected, strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours, measure) < TOLERANCE[dtype]


@pytest.mark.usefixtures("with_varlen_kernel")
def test_the_compiled_varlen_kernel_gives_the_same_values_and_gradients() -> None:
    states, bounds, longest = row_of_states(64, 8)
    leaves = [x.to(DEVICE, torch.bfloat16).requires_grad_() for x in states]
    compiled = torch.compile(attention.varlen, fullgraph=True)
    attended = compiled(leaves[0], leaves[1], leaves[2], bounds.to(DEVICE), longest)
    attended.float().sum().backward()
    gradients = [leaf.grad for leaf in leaves]
    again = [leaf.detach().requires_grad_() for leaf in leaves]
    plain = attention.varlen(again[0], again[1], again[2], bounds.to(DEVICE), longest)
    plain.float().sum().backward()
    torch.testing.assert_close(attended, plain)
    for ours, leaf in zip(gradients, again, strict=True):
        torch.testing.assert_close(ours, leaf.grad)


# --- the model ------------------------------------------------------------------------------------


def loss_and_gradients(model: Phi3VForCausalLM, device: torch.device) -> tuple[Tensor, Tensor]:
    """The summed loss of the row, and all gradients in one vector (float32, on the CPU)."""
    model.zero_grad()
    loss = model.packed_loss(packed_row(*ROW).to(device))
    loss.backward()
    gradients = [p.grad.float().cpu().flatten() for p in model.parameters() if p.grad is not None]
    return loss.detach().cpu(), torch.cat(gradients)


@pytest.fixture(scope="module")
def measure() -> tuple[Tensor, Tensor]:
    return loss_and_gradients(small_model().train(), torch.device("cpu"))


def on_device(model: Phi3VForCausalLM, dtype: torch.dtype = torch.float32) -> Phi3VForCausalLM:
    nn.Module.to(model, DEVICE, dtype)
    return model


def test_float32_on_the_gpu_gives_the_loss_and_gradients_of_the_cpu(
    measure: tuple[Tensor, Tensor],
) -> None:
    loss, gradients = loss_and_gradients(on_device(small_model().train()), DEVICE)
    torch.testing.assert_close(loss, measure[0], rtol=1e-5, atol=0)
    assert relative_error(gradients, measure[1]) < 1e-4


@HALF
@pytest.mark.parametrize("way", ["half weights", "autocast over float32 weights"])
def test_half_precision_gives_nearly_the_loss_and_gradients_of_float32(
    way: str, dtype: torch.dtype, measure: tuple[Tensor, Tensor]
) -> None:
    is_autocast = way.startswith("autocast")
    model = on_device(small_model().train(), torch.float32 if is_autocast else dtype)
    with torch.autocast("cuda", dtype=dtype, enabled=is_autocast), CountSdpa() as calls:
        loss, gradients = loss_and_gradients(model, DEVICE)
    if torch.cuda.get_device_capability() >= (8, 0):
        assert calls.count == 2  # the computed vision layers; packed rows go to the kernel
    torch.testing.assert_close(loss, measure[0], rtol=TOLERANCE[dtype], atol=0)
    assert bool(gradients.isfinite().all())
    assert relative_error(gradients, measure[1]) < 10 * TOLERANCE[dtype]


@pytest.mark.usefixtures("with_varlen_kernel")
def test_fp16_trains_with_the_flash_kernel_and_a_gradient_scaler() -> None:
    model = on_device(small_model().train())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**12)
    row = packed_row(*ROW).to(DEVICE)
    losses: list[float] = []
    for _ in range(8):
        with torch.autocast("cuda", dtype=torch.float16):
            loss = model.packed_loss(row) / row.num_label_tokens
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert scaler.get_scale() == 2.0**12  # no step met a gradient beyond fp16


@needs_parity
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["one_image", "two_images", "batch_length_mask"])
def test_the_recorded_logits_hold_on_a_gpu(name: str, implementation: str) -> None:
    case = read_case(name)
    model = on_device(reference_model(attn_implementation=implementation))
    with torch.no_grad():
        output = model(**{key: x.to(DEVICE) for key, x in model_inputs(case).items()})
    torch.testing.assert_close(output.loss.cpu(), case["loss"][0], atol=2e-5, rtol=0)
    for row, position in enumerate(case["last_position"].tolist()):
        torch.testing.assert_close(
            output.logits[row, position].cpu(), case["logits_last"][row], atol=1e-4, rtol=0
        )


def test_views_are_normalised_on_the_device_as_on_the_cpu() -> None:
    prompt = Prompt(4, ((2, 3), (1, 1)), seed=7)
    grids = list(prompt.grids)
    expected = normalize_views(prompt.crops, grids)
    actual = normalize_views(prompt.crops.to(DEVICE), grids)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, atol=2e-6, rtol=0)


# --- generation -----------------------------------------------------------------------------------


def generated(model: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """New tokens of a left-padded batch with pictures, and their logits."""
    inputs = {key: x.to(device) for key, x in call_inputs(*ROW).items()}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    output = model.generate(
        **inputs,
        max_new_tokens=5,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences[:, -5:].cpu(), torch.stack(output.logits, dim=1).float().cpu()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_generation_on_the_gpu_gives_the_tokens_of_the_cpu(implementation: str) -> None:
    model = small_model(attn_implementation=implementation)
    tokens, logits = generated(model, torch.device("cpu"))
    ours, our_logits = generated(on_device(model), DEVICE)
    assert torch.equal(ours, tokens)
    torch.testing.assert_close(our_logits, logits, atol=1e-3, rtol=0)


@HALF
def test_generation_in_half_precision_starts_from_nearly_the_logits_of_float32(
    dtype: torch.dtype,
) -> None:
    model = small_model()
    _, expected = generated(model, torch.device("cpu"))
    _, logits = generated(on_device(model, dtype), DEVICE)
    assert bool(logits.isfinite().all())
    assert relative_error(logits[:, 0], expected[:, 0]) < 10 * TOLERANCE[dtype]


# --- flash-attn, where it is installed ------------------------------------------------------------


@pytest.fixture
def flash_model() -> Phi3VForCausalLM:
    pytest.importorskip("flash_attn")
    return on_device(small_model(attn_implementation="flash_attention_2"), torch.bfloat16)


def test_flash_attention_2_gives_nearly_the_loss_and_gradients_of_sdpa(
    flash_model: Phi3VForCausalLM,
) -> None:
    flash, flash_gradients = loss_and_gradients(flash_model.train(), DEVICE)
    flash_model.set_attn_implementation("sdpa")
    sdpa, gradients = loss_and_gradients(flash_model, DEVICE)
    torch.testing.assert_close(flash, sdpa, rtol=TOLERANCE[torch.bfloat16], atol=0)
    assert relative_error(flash_gradients, gradients) < 10 * TOLERANCE[torch.bfloat16]


def test_flash_attention_2_generates_as_sdpa_does(flash_model: Phi3VForCausalLM) -> None:
    tokens, logits = generated(flash_model, DEVICE)
    flash_model.set_attn_implementation("sdpa")
    expected_tokens, expected = generated(flash_model, DEVICE)
    assert torch.equal(tokens, expected_tokens)
    assert torch.equal(logits, expected)


# --- compiled and quantised -----------------------------------------------------------------------


@pytest.mark.usefixtures("with_varlen_kernel")
def test_compiled_layers_give_nearly_the_loss_of_plain_ones() -> None:
    plain = on_device(small_model().train(), torch.bfloat16)
    compiled = copy.deepcopy(plain)
    for layer in compiled.model.layers:
        layer.compile()
    expected, gradients = loss_and_gradients(plain, DEVICE)
    loss, compiled_gradients = loss_and_gradients(compiled, DEVICE)
    torch.testing.assert_close(loss, expected, rtol=TOLERANCE[torch.bfloat16], atol=0)
    assert relative_error(compiled_gradients, gradients) < 10 * TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(("bits", "least_similarity"), [(4, 0.9), (8, 0.98)])
def test_quantised_weights_load_on_the_gpu_and_answer_nearly_the_same(
    bits: int, least_similarity: float, tmp_path: Path
) -> None:
    from transformers import BitsAndBytesConfig

    model = small_model()
    model.save_pretrained(tmp_path)
    settings: dict[str, Any] = (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float16"}
        if bits == 4
        else {"load_in_8bit": True}
    )
    quantised = Phi3VForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=BitsAndBytesConfig(**settings),
        dtype=torch.float16,
        device_map={"": DEVICE},
    )
    kinds = {type(module).__name__ for module in quantised.modules()}
    assert ("Linear4bit" if bits == 4 else "Linear8bitLt") in kinds
    assert quantised.generation_config is not None
    quantised.generation_config.eos_token_id = None
    _, expected = generated(model, torch.device("cpu"))
    _, logits = generated(quantised, DEVICE)
    first = F.cosine_similarity(logits[:, 0], expected[:, 0])
    assert float(first.min()) > least_similarity


# --- methods and optimizers -----------------------------------------------------------------------

EVERY_KIND = pytest.mark.parametrize(
    "method",
    [{"name": "full"}, LORA, MIXED, QLORA],
    ids=["full", "lora", "vision in full", "qlora"],
)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@EVERY_KIND
def test_a_method_takes_a_step_on_the_gpu_from_nearly_the_loss_of_the_cpu(
    method: dict[str, Any], precision: Any
) -> None:
    config = MethodConfig.model_validate(method)
    training = prepare(small_model(), config, precision, device=DEVICE)
    move(training.model, DEVICE)
    assert {p.dtype for p in training.trainable.values()} == {torch.float32}
    # Weights rounded to half precision may fall to another of the 4-bit levels.
    tolerance = 0.1 if method["name"] == "qlora" else 0.05
    assert step(training) == pytest.approx(step(prepared(method)), rel=tolerance)  # all gradients


def test_4_bit_weights_are_never_on_the_gpu_in_full() -> None:
    model = small_model(intermediate_size=16384)
    full = 4 * sum(p.numel() for n, p in model.named_parameters() if n.startswith("model.layers."))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    training = prepare(model, MethodConfig.model_validate(QLORA), "bf16", device=DEVICE)
    move(training.model, DEVICE)
    assert torch.cuda.max_memory_allocated() - before < full / 2


def weights_after(settings: OptimConfig, device: torch.device) -> tuple[Tensor, Any]:
    """A matrix after five steps on noise, and the optimizer."""
    weight = nn.Parameter(torch.linspace(-1, 1, 96 * 64).reshape(96, 64).to(device))
    optimizer = make_optimizer({"weight": weight}, settings)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        weight.grad = torch.randn(96, 64, generator=generator).to(device)
        optimizer.step()
    return weight.detach().cpu(), optimizer


@pytest.mark.parametrize(("name", "tolerance"), [("adamw", 1e-5), ("adamw8bit", 0.05)])
def test_an_optimizer_moves_weights_on_the_gpu_as_adamw_does_on_the_cpu(
    name: Any, tolerance: float
) -> None:
    expected, _ = weights_after(OptimConfig(learning_rate=1e-2), torch.device("cpu"))
    found, optimizer = weights_after(OptimConfig(learning_rate=1e-2, name=name), DEVICE)
    start = torch.linspace(-1, 1, 96 * 64).reshape(96, 64)
    assert float((found - expected).norm()) < tolerance * float((expected - start).norm())
    if name == "adamw":
        assert optimizer.defaults["fused"]
    else:
        assert next(iter(optimizer.state.values()))["state1"].dtype == torch.uint8


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("method", ["full", "qlora"])
def test_a_run_in_half_precision_learns_and_goes_on_where_it_stopped(
    method: str,
    precision: str,
    optimizer: str,
    tiny: Path,
    toy_shards: Path,
    tmp_path: Path,
) -> None:
    more = ("device=cuda", f"precision={precision}", f"method.name={method}")
    more += (f"optim.name={optimizer}", "method.lora.rank=32", "train.max_steps=6")
    more += ("checkpoint.every_steps=3", "checkpoint.keep=9")
    train(toy_config(tiny, toy_shards, tmp_path / "whole", *more))
    losses = losses_of(tmp_path / "whole")
    assert sum(losses[3:]) < sum(losses[:3])  # the second epoch against the first
    checkpoints = tmp_path / "resumed" / "checkpoints"
    name = "step-00000003"
    shutil.copytree(tmp_path / "whole" / "checkpoints" / name, checkpoints / name)
    (checkpoints / "latest").write_text(f"{name}\n")
    train(toy_config(tiny, toy_shards, tmp_path / "resumed", *more), resume=True)
    assert [line["step"] for line in log_lines(tmp_path / "resumed")] == [4, 5, 6]
    # Sums on a GPU need not be in the same order twice.
    assert losses_of(tmp_path / "resumed") == pytest.approx(losses[3:], rel=2e-2)
