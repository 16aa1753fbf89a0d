"""Attention: by itself against plain arithmetic, and what reaches it from the model.

No GPU here; `test_gpu.py` has the kernels. Two stand-ins for what a CPU lacks: tensors without
data on a pretended GPU show that torch's varlen kernel takes our call, and a small module in
flash-attn's place, with its published signature and plain arithmetic inside, shows that ours does.
"""

import importlib.util
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from phi3v_train import attention
from phi3v_train.collator import EncodedSample, collate
from phi3v_train.modeling_phi3_v import Phi3VForCausalLM, causal_mask
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from tests.train.parity import needs_parity, read_case, reference_model
from tests.train.small_models import IMAGE_TOKEN, Prompt, call_inputs, packed_row, small_model

BOTH = pytest.mark.parametrize("implementation", ["sdpa", "eager"])
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
LIMIT = 64
"""Tokens up to which the models below have short rotary factors."""

without_flash_attn = pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed"
)


# --- by itself ------------------------------------------------------------------------------------


def random_row(
    lengths: list[int], num_heads: int = 4, num_key_heads: int = 2, width: int = 8
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    total = sum(lengths)
    query = torch.randn(total, num_heads, width, generator=generator)
    key = torch.randn(total, num_key_heads, width, generator=generator)
    value = torch.randn(total, num_key_heads, width, generator=generator)
    bounds = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
    return query, key, value, bounds


def plain(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor) -> Tensor:
    """One token and one head after the other, in float64."""
    rows = torch.zeros(query.shape, dtype=torch.float64)
    group = query.shape[1] // key.shape[1]
    starts = bounds.tolist()
    for start, stop in itertools.pairwise(starts):
        for token in range(start, stop):
            for head in range(query.shape[1]):
                seen = slice(start, token + 1)
                keys = key[seen, head // group].double()
                scores = keys @ query[token, head].double() / query.shape[2] ** 0.5
                rows[token, head] = scores.softmax(0) @ value[seen, head // group].double()
    return rows


@BOTH
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4))
def test_a_segment_attends_to_itself_and_to_nothing_later(
    implementation: str, lengths: list[int]
) -> None:
    query, key, value, bounds = random_row(lengths)
    attended = attention.varlen(
        query, key, value, bounds, max(lengths), implementation=implementation
    )
    torch.testing.assert_close(
        attended.double(), plain(query, key, value, bounds), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("implementation", attention.IMPLEMENTATIONS)
def test_a_padded_batch_attends_where_the_mask_says(implementation: str) -> None:
    query, key, value, _ = random_row([10])
    mask = torch.ones(10, 10, dtype=torch.bool).tril()
    by_head = [x.transpose(0, 1)[None] for x in (query, key, value)]
    attended = attention.dense(
        by_head[0], by_head[1], by_head[2], mask, implementation=implementation
    )
    expected = plain(query, key, value, torch.tensor([0, 10]))
    torch.testing.assert_close(attended[0].transpose(0, 1).double(), expected, atol=1e-5, rtol=0)


def test_eager_fp16_scores_beyond_the_range_of_fp16_stay_finite() -> None:
    # 96 products of 30 * 30 are 86,400: only the scaled score is below fp16's 65,504.
    states = torch.full((4, 1, 96), 30.0, dtype=torch.float16)
    bounds = torch.tensor([0, 4], dtype=torch.int32)
    attended = attention.varlen(states, states, states, bounds, 4, implementation="eager")
    assert torch.equal(attended, states)


def test_the_lowest_value_of_an_eager_mask_exists_in_fp16() -> None:
    states = torch.randn(1, 1, 3, 8).half()
    mask = causal_mask(3, 0, None, torch.device("cpu"))
    assert mask.dtype == torch.bool
    attended = attention.dense(states, states, states, mask, implementation="eager")
    assert bool(attended.isfinite().all())
    torch.testing.assert_close(attended[0, 0, 0], states[0, 0, 0])


# --- torch's varlen kernel, without a GPU ---------------------------------------------------------


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Tensor]]:
    """Makes tensors without data on a GPU of capability 8.0 that is not there."""
    # One level below what the code calls, which torch.compile treats by its own name.
    properties = SimpleNamespace(major=8, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device=None: properties)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        is_float = dtype.is_floating_point
        return torch.empty(*shape, dtype=dtype, device="cuda:0", requires_grad=is_float)

    with FakeTensorMode(allow_non_fake_inputs=True):
        yield empty


@HALF
def test_torchs_varlen_kernel_takes_our_call_and_is_differentiable(
    ampere: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    query = ampere(10, 4, 16, dtype=dtype)
    key, value = (ampere(10, 2, 16, dtype=dtype) for _ in range(2))
    attended = attention.varlen(query, key, value, ampere(3, dtype=torch.int32), 7)
    assert attended.shape == (10, 4, 16)
    assert attended.dtype == dtype
    assert attended.grad_fn is not None
    assert "varlen_attn" in type(attended.grad_fn).__name__


def test_the_varlen_kernel_compiles_into_one_graph(ampere: Callable[..., Tensor]) -> None:
    calls: list[str] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
        calls.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(attention.varlen, fullgraph=True, backend=backend)
    states = ampere(10, 2, 16, dtype=torch.float16)
    assert compiled(states, states, states, ampere(3, dtype=torch.int32), 7).shape == (10, 2, 16)
    assert any("varlen_attn" in call for call in calls)
    assert not any("capability" in call for call in calls)


# --- the user's choice ----------------------------------------------------------------------------


def test_an_unknown_attention_is_refused_with_the_choices() -> None:
    for name in ("flash_attention_3", "flex_attention", "kernels-community/flash-attn2", "spda"):
        with pytest.raises(ValueError, match="expected one of sdpa, eager, flash_attention_2"):
            small_model(attn_implementation=name)


@without_flash_attn
def test_flash_attention_that_is_not_installed_names_the_extra_and_the_way_without() -> None:
    with pytest.raises(ImportError, match=r"phi3v-train\[flash-attn\].*--extra flash-attn.*sdpa"):
        small_model(attn_implementation="flash_attention_2")


@without_flash_attn
def test_only_the_callers_request_counts_not_the_one_in_the_file(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "_attn_implementation": "flash_attention_2"})
    )
    assert Phi3VForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    asked = Phi3VForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert asked.config._attn_implementation == "eager"
    with pytest.raises(ImportError, match="flash-attn"):
        Phi3VForCausalLM.from_pretrained(tmp_path, attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match="expected one of"):
        Phi3VForCausalLM.from_pretrained(tmp_path, attn_implementation="falsh")


class SdpaCalls(TorchFunctionMode):
    """Notes what goes into torch's scaled dot product attention, before autocast touches it."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[tuple[Tensor, Tensor, Tensor]] = []
        self.masks: list[Tensor | None] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.inputs.append(args[:3])
            self.masks.append(kwargs.get("attn_mask"))
        return func(*args, **kwargs)


def test_the_choice_holds_for_packed_rows_padded_batches_and_vision_and_can_change() -> None:
    model = small_model(attn_implementation="eager")
    picture = Prompt(20, ((1, 1),), seed=1)
    row = packed_row(picture, Prompt(20, seed=2))
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with torch.no_grad(), SdpaCalls() as packed:
            model.packed_loss(row)
        with torch.no_grad(), SdpaCalls() as padded:
            model(**call_inputs(picture))
        # Two decoder layers of two segments, or of one batch; two computed vision layers.
        counts = (len(packed.inputs), len(padded.inputs))
        assert counts == ((0, 0) if implementation == "eager" else (2 * 2 + 2, 2 + 2))
    with pytest.raises(ValueError, match="expected one of"):
        model.set_attn_implementation("flex_attention")
    assert model.config._attn_implementation == "sdpa"


# --- flash-attn, by a stand-in --------------------------------------------------------------------


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """flash-attn 2.8's signature, and what its documentation says of the arguments we use."""
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert q.dtype == k.dtype == v.dtype
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert isinstance(max_seqlen_q, int)
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert causal
    assert softmax_scale is None
    assert dropout_p == softcap == 0
    return plain(q, k, v, cu_seqlens_q).to(q.dtype)


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flash_attn")
    module.__dict__["flash_attn_varlen_func"] = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@HALF
@pytest.mark.usefixtures("flash_attn")
def test_flash_attn_gets_its_documented_arguments(dtype: torch.dtype) -> None:
    query, key, value, bounds = random_row([5, 1, 9])
    query, key, value = (x.to(dtype) for x in (query, key, value))
    ours = attention.varlen(query, key, value, bounds, 9, implementation="flash_attention_2")
    torch.testing.assert_close(ours, plain(query, key, value, bounds).to(dtype))


@pytest.mark.usefixtures("flash_attn")
def test_flash_attn_is_used_for_packed_rows_only() -> None:
    model = small_model().bfloat16()
    row = packed_row(Prompt(20, seed=1), Prompt(30, seed=2))
    with torch.no_grad():
        expected = model.packed_loss(row)
        model.set_attn_implementation("flash_attention_2")
        with SdpaCalls() as packed:
            loss = model.packed_loss(row)
        with SdpaCalls() as padded:
            model(**call_inputs(Prompt(20, seed=1)))
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
    assert not packed.inputs
    assert len(padded.inputs) == 2


@pytest.mark.usefixtures("flash_attn")
def test_flash_attn_refuses_float32_with_the_ways_out() -> None:
    query, key, value, bounds = random_row([4])
    with pytest.raises(ValueError, match=r"expected fp16 or bf16, got torch\.float32.*autocast"):
        attention.varlen(query, key, value, bounds, 4, implementation="flash_attention_2")


# --- a packed row gives every sample what it has alone --------------------------------------------


def packed_logits(model: Phi3VForCausalLM, prompts: list[Prompt]) -> list[Tensor]:
    row = packed_row(*prompts)
    with torch.no_grad():
        logits = model.lm_head(model.model.packed(row))
    return list(logits.split(row.cu_seqlens.diff().tolist()))


def assert_as_alone(model: Phi3VForCausalLM, prompts: list[Prompt]) -> None:
    for prompt, logits in zip(prompts, packed_logits(model, prompts), strict=True):
        with torch.no_grad():
            alone = model(**call_inputs(prompt)).logits[0]
        torch.testing.assert_close(logits, alone, atol=1e-5, rtol=0, msg=str(prompt))


MIXTURE = [
    Prompt(LIMIT, seed=1),  # just within the limit
    Prompt(LIMIT + 1, seed=2),  # one beyond it
    Prompt(25, ((1, 2), (1, 1)), seed=3),
    Prompt(9, seed=4),
    Prompt(1, seed=5),
    Prompt(20, ((2, 1),), seed=6),
]


def long_rope_model(**changes: Any) -> Phi3VForCausalLM:
    return small_model(**{"original_max_position_embeddings": LIMIT, **changes})


@BOTH
def test_packed_samples_on_both_sides_of_the_limit_have_the_logits_they_have_alone(
    implementation: str,
) -> None:
    assert_as_alone(long_rope_model(attn_implementation=implementation), MIXTURE)


@BOTH
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_packing_of_any_lengths_gives_the_logits_alone(
    implementation: str, data: st.DataObject
) -> None:
    lengths = data.draw(st.lists(st.integers(1, 3 * LIMIT // 2), min_size=1, max_size=6))
    prompts = [Prompt(length, seed=seed) for seed, length in enumerate(lengths)]
    assert_as_alone(long_rope_model(attn_implementation=implementation), prompts)


@BOTH
def test_one_long_neighbour_switches_nobody_else_to_the_long_factors(implementation: str) -> None:
    model = long_rope_model(attn_implementation=implementation)
    short = Prompt(LIMIT - 1, seed=1)
    beside_long, _ = packed_logits(model, [short, Prompt(2 * LIMIT, seed=2)])
    (alone,) = packed_logits(model, [short])
    torch.testing.assert_close(beside_long, alone, atol=1e-5, rtol=0)
    # The factors do differ: with a limit below its length the same sample has other logits.
    (switched,) = packed_logits(long_rope_model(original_max_position_embeddings=8), [short])
    assert float((switched - alone).abs().max()) > 1e-2


@needs_parity
@BOTH
def test_a_packed_row_of_recorded_samples_has_their_recorded_hidden_states(
    implementation: str,
) -> None:
    model = reference_model("config_long.json", attn_implementation=implementation)
    names = ["rope_len_64", "rope_len_65", "rope_padded_batch_row1_alone", "rope_len_64"]
    cases = [read_case(name) for name in names]
    row = collate(
        [
            EncodedSample(
                sample_id=name,
                input_ids=case["input_ids"][0].numpy(),
                labels=case["labels"][0].numpy(),
                crops=np.zeros((0, 3, 336, 336), dtype=np.uint8),
                crop_grid=np.zeros((0, 2), dtype=np.int32),
            )
            for name, case in zip(names, cases, strict=True)
        ]
    )
    with torch.no_grad():
        packed = model.model.packed(row).split(row.cu_seqlens.diff().tolist())
    for case, hidden in zip(cases, packed, strict=True):
        torch.testing.assert_close(hidden, case["final_hidden_state"][0], atol=5e-5, rtol=0)
        logits = model.lm_head(hidden)
        torch.testing.assert_close(
            logits.logsumexp(-1), case["logits_logsumexp"][0], atol=1e-4, rtol=0
        )
        last = int(case["last_position"][0])
        torch.testing.assert_close(logits[last], case["logits_last"][0], atol=1e-4, rtol=0)


@needs_parity
@BOTH
def test_a_packed_mixture_has_the_logits_alone_under_the_recorded_long_config(
    implementation: str,
) -> None:
    model = reference_model(
        "config_long.json", attn_implementation=implementation, image_token_id=IMAGE_TOKEN
    )
    assert_as_alone(model, [*MIXTURE[:2], *MIXTURE[3:]])


# --- half precision -------------------------------------------------------------------------------


def dtypes_at_attention(calls: SdpaCalls) -> set[torch.dtype]:
    return {x.dtype for inputs in calls.inputs for x in inputs}


HALF_ROW = (Prompt(30, ((1, 1),), seed=1), Prompt(30, seed=2))


@HALF
@pytest.mark.parametrize("way", ["half weights", "autocast over float32 weights"])
def test_query_key_and_value_are_the_same_half_type_when_they_reach_attention(
    way: str, dtype: torch.dtype
) -> None:
    model = small_model().train()
    is_autocast = way.startswith("autocast")
    if not is_autocast:
        nn.Module.to(model, dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=is_autocast):
        with SdpaCalls() as packed:
            loss = model.packed_loss(packed_row(*HALF_ROW))
        with torch.no_grad(), SdpaCalls() as padded:
            model(**call_inputs(*HALF_ROW))
    assert len(packed.inputs) == 2 * 2 + 2
    assert dtypes_at_attention(packed) == {dtype}
    assert dtypes_at_attention(padded) == {dtype}
    assert packed.masks == [None] * len(packed.masks)
    assert {mask.dtype for mask in padded.masks if mask is not None} == {torch.bool}
    assert loss.dtype == torch.float32
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


@HALF
def test_half_precision_gives_nearly_the_loss_of_float32(dtype: torch.dtype) -> None:
    model = small_model()
    with torch.no_grad():
        expected = model.packed_loss(packed_row(*HALF_ROW))
        with torch.autocast("cpu", dtype=dtype):
            mixed = model.packed_loss(packed_row(*HALF_ROW))
        nn.Module.to(model, dtype)
        half = model.packed_loss(packed_row(*HALF_ROW))
    tolerance = 2e-3 if dtype == torch.float16 else 2e-2  # 11 and 8 bits of precision
    torch.testing.assert_close(mixed, expected, rtol=tolerance, atol=0)
    torch.testing.assert_close(half, expected, rtol=tolerance, atol=0)


# --- what is computed, and what is not ------------------------------------------------------------


def rows_seen(module: nn.Module) -> list[int]:
    seen: list[int] = []
    module.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    return seen


@pytest.mark.parametrize("num_extra_views", [0, 7])
def test_the_vision_tower_sees_real_crops_and_global_views_once_and_no_padding(
    num_extra_views: int,
) -> None:
    model = small_model()
    tower = model.model.vision_embed_tokens.img_processor.vision_model
    seen = rows_seen(tower.embeddings)
    by_layer = [rows_seen(layer) for layer in tower.encoder.layers]
    norm = rows_seen(tower.post_layernorm)
    two, one = Prompt(12, ((1, 2), (2, 2)), seed=1), Prompt(12, ((1, 1),), seed=2)
    padded = call_inputs(two)
    zeros = torch.zeros(2, num_extra_views, 3, 336, 336)
    padded["pixel_values"] = torch.cat([padded["pixel_values"], zeros], dim=1)
    with torch.no_grad():
        model.packed_loss(packed_row(two, one))
        model(**padded)
    # Crops and one global view an image: of both prompts, then of the first alone.
    expected = [(2 + 1) + (4 + 1) + (1 + 1), (2 + 1) + (4 + 1)]
    assert seen == expected
    assert by_layer == [expected, expected, []]
    assert norm == []


def test_training_computes_logits_for_labels_only() -> None:
    model = small_model().train()
    seen = rows_seen(model.lm_head)
    model.packed_loss(packed_row(*MIXTURE[:4], num_labels=4))
    assert seen == [4 * 4]


def test_generation_computes_logits_for_the_last_position_only() -> None:
    model = small_model()
    seen: list[int] = []
    model.lm_head.register_forward_hook(
        lambda _module, inputs, _output: seen.append(inputs[0].shape[1])
    )
    model.generate(  # pyright: ignore[reportAttributeAccessIssue]
        **call_inputs(Prompt(20), Prompt(9)), max_new_tokens=3, do_sample=False
    )
    assert seen == [1, 1, 1]
