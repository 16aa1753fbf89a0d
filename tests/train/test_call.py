"""The published model's call, as code written for it makes it."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from phi3v_train.modeling_phi3_v import Phi3VForCausalLM
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.train.parity import (
    PARITY,
    model_inputs,
    needs_parity,
    read_case,
    read_json,
    reference_model,
)
from tests.train.small_models import ROPE_LIMIT, Prompt, call_inputs, small_model

PROMPT = Prompt(12, ((1, 1),), seed=1)


def inputs_with_labels() -> dict[str, Tensor]:
    inputs = call_inputs(PROMPT)
    ids = inputs["input_ids"]
    return {**inputs, "labels": ids.masked_fill(ids < 0, -100)}


def test_arguments_stand_in_the_published_order() -> None:
    parameters = inspect.signature(Phi3VForCausalLM.forward).parameters
    by_place = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert by_place[1:] == [
        "input_ids",
        "attention_mask",
        "position_ids",
        "past_key_values",
        "inputs_embeds",
        "pixel_values",
        "image_sizes",
        "labels",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
    ]


def test_an_output_is_read_by_name_and_by_place() -> None:
    model = small_model()
    with torch.no_grad():
        output: Any = model(**inputs_with_labels())
        unlabelled: Any = model(**call_inputs(PROMPT))
    assert torch.equal(output[0], output.loss)
    assert torch.equal(output["logits"], output.logits)
    assert torch.equal(output[1], output.logits)
    assert torch.equal(unlabelled[0], output.logits)
    assert output.hidden_states is None
    assert output.past_key_values.get_seq_length() == len(PROMPT.ids)


@pytest.mark.parametrize("by", ["argument", "configuration"])
def test_without_return_dict_the_output_is_a_tuple(by: str) -> None:
    model = small_model()
    if by == "configuration":
        model.config.return_dict = False
    settings = {"return_dict": False} if by == "argument" else {}
    with torch.no_grad():
        output: Any = model(**inputs_with_labels(), use_cache=False, **settings)
        expected: Any = small_model()(**inputs_with_labels(), return_dict=True)
    assert type(output) is tuple
    loss, logits = output
    assert torch.equal(loss, expected.loss)
    assert torch.equal(logits, expected.logits)


def test_hidden_states_are_the_inputs_of_the_layers_and_the_last_norm() -> None:
    model = small_model()
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        output: Any = model(**call_inputs(PROMPT), output_hidden_states=True)
    assert len(output.hidden_states) == len(model.model.layers) + 1
    for state, layer_input in zip(output.hidden_states, seen, strict=False):
        assert torch.equal(state, layer_input)
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)


@needs_parity
def test_hidden_states_are_the_recorded_ones() -> None:
    case = read_case("text_only")
    with torch.no_grad():
        output: Any = reference_model()(**model_inputs(case), output_hidden_states=True)
    recorded = [n for n in case if n.startswith("hidden_state_")]
    assert len(recorded) == 2
    for name in recorded:
        state = output.hidden_states[int(name.removeprefix("hidden_state_"))]
        torch.testing.assert_close(state, case[name], atol=1e-4, rtol=0)
    torch.testing.assert_close(
        output.hidden_states[-1], case["final_hidden_state"], atol=1e-4, rtol=0
    )


@needs_parity
def test_a_folder_with_a_vision_config_gives_the_recorded_logits(tmp_path: Path) -> None:
    fields = read_json("model/config.json")
    vision = read_json("model/vision_config.json")
    (tmp_path / "config.json").write_text(json.dumps({**fields, "vision_config": vision}))
    weights = load_file(PARITY / "model/weights.safetensors")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = Phi3VForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    case = read_case("two_images")
    with torch.no_grad():
        output: Any = model(**model_inputs(case))
    torch.testing.assert_close(output.loss, case["loss"][0], atol=2e-5, rtol=0)
    torch.testing.assert_close(
        output.logits.logsumexp(-1), case["logits_logsumexp"], atol=1e-4, rtol=0
    )


def test_a_misspelt_argument_is_an_error() -> None:
    with pytest.raises(TypeError, match="pixel_value'"):
        small_model()(torch.tensor([[1, 7, 8]]), pixel_value=torch.zeros(1))


def test_attention_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="output_attentions"):
        small_model()(torch.tensor([[1, 7, 8]]), output_attentions=True)


def test_the_loss_is_divided_by_what_a_trainer_says() -> None:
    model = small_model()
    inputs = inputs_with_labels()
    count = int((inputs["labels"][:, 1:] != -100).sum())
    with torch.no_grad():
        mean: Any = model(**inputs)
        shared: Any = model(**inputs, num_items_in_batch=torch.tensor(4 * count))
    torch.testing.assert_close(shared.loss * 4, mean.loss)


def test_a_manual_loop_over_the_cache_gives_the_logits_of_the_whole() -> None:
    model = small_model()
    ids = torch.tensor([Prompt(40, seed=3).ids])
    assert ids.shape[1] < ROPE_LIMIT
    cache: Any = None
    steps: list[Tensor] = []
    with torch.no_grad():
        whole: Any = model(ids)
        for part in ids.split([25, 1, 4, 10], dim=1):
            output: Any = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole.logits, atol=1e-5, rtol=0)


def test_logits_to_keep_are_the_last_ones_or_the_named_ones() -> None:
    model = small_model()
    with torch.no_grad():
        whole: Any = model(**call_inputs(PROMPT))
        last: Any = model(**call_inputs(PROMPT), logits_to_keep=2)
        named: Any = model(**call_inputs(PROMPT), logits_to_keep=torch.tensor([0, 5]))
    torch.testing.assert_close(last.logits, whole.logits[:, -2:], atol=1e-5, rtol=0)
    torch.testing.assert_close(named.logits, whole.logits[:, [0, 5]], atol=1e-5, rtol=0)


def test_transformers_trainer_accumulates_to_the_loss_of_the_whole_batch(tmp_path: Path) -> None:
    """Rows with few and many labels: a mean of means would be another step."""
    from transformers import Trainer, TrainingArguments

    rows = [Prompt(6, seed=1).ids, Prompt(40, seed=2).ids]
    data: Any = [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in rows]
    model = small_model()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=1,
        learning_rate=0.1,
        optim="sgd",
        max_grad_norm=0,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=data).train()
    plain = small_model().train()
    losses = [
        plain(ids[None], labels=ids[None]).loss * (len(ids) - 1) for ids in map(torch.tensor, rows)
    ]
    (torch.stack(losses).sum() / sum(len(row) - 1 for row in rows)).backward()
    head = plain.lm_head.weight
    assert head.grad is not None
    stepped = head.detach() - 0.1 * head.grad
    torch.testing.assert_close(model.lm_head.weight.detach(), stepped, atol=1e-6, rtol=0)


def test_a_prompt_without_padding_needs_no_mask_and_gives_the_same_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from phi3v_train import modeling_phi3_v

    model = small_model()
    ids = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([torch.zeros(2, 1, dtype=torch.int64), ids], dim=1)
    mask = torch.ones_like(padded)
    mask[:, 0] = 0
    positions = torch.arange(-1, 12).clamp(min=0).expand(2, -1)
    with torch.no_grad():
        expected = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits
        made: list[int] = []
        real = modeling_phi3_v.causal_mask
        monkeypatch.setattr(
            modeling_phi3_v, "causal_mask", lambda *a: made.append(a[0]) or real(*a)
        )
        first = model(input_ids=ids[:, :8], attention_mask=torch.ones(2, 8), use_cache=True)
        step = model(input_ids=ids[:, 8:9], past_key_values=first.past_key_values)
        assert made == []
        rest = model(input_ids=ids[:, 9:], past_key_values=step.past_key_values)
    assert made == [3]  # several new tokens behind a cache do need one
    logits = torch.cat([first.logits, step.logits, rest.logits], dim=1)
    torch.testing.assert_close(logits, expected[:, 1:], atol=1e-5, rtol=0)
