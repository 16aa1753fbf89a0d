"""LoRA by PEFT as a user would: official names in the adapter, equal results after a merge."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from phi3v_train.modeling_phi3_v import Phi3VForCausalLM
from safetensors.torch import load_file
from torch import Tensor

from tests.train.parity import needs_parity, read_json
from tests.train.small_models import Prompt, call_inputs, packed_row, small_config, small_model

PROMPTS = [Prompt(12, ((1, 2),), seed=1), Prompt(10, (), seed=2)]

OFFICIAL_LINEARS = [
    "qkv_proj",  # queries, keys and values are one matrix in the checkpoint
    "o_proj",
    "gate_up_proj",
    "down_proj",
    "q_proj",  # of CLIP
    "k_proj",
    "v_proj",
    "out_proj",
    "fc1",
    "fc2",
    "img_projection.0",
    "img_projection.2",
    "lm_head",
]


def with_adapters(model: Any, seed: int = 5) -> Any:
    """LoRA on every kind of linear layer, its weights random, so that it changes the logits."""
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=OFFICIAL_LINEARS, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(model, settings)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.1)
    return adapted.eval()


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**call_inputs(*PROMPTS)).logits


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    small_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    adapted = with_adapters(Phi3VForCausalLM.from_pretrained(base))
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def test_a_saved_adapter_names_the_modules_of_the_model(base: Path, adapter: Path) -> None:
    linears = {
        name.removesuffix(".weight")
        for name, weight in Phi3VForCausalLM.from_pretrained(base).named_parameters()
        if name.endswith(tuple(f"{n}.weight" for n in OFFICIAL_LINEARS)) and weight.dim() == 2
    }
    assert len(linears) == 2 * 4 + 3 * 6 + 2 + 1
    assert load_file(adapter / "adapter_model.safetensors").keys() == {
        f"base_model.model.{name}.lora_{side}.weight" for name in linears for side in "AB"
    }
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)


@needs_parity
def test_an_adapter_of_the_real_model_fits_the_official_checkpoint() -> None:
    """Every adapter pair belongs to an official weight, and has its shape."""
    from phi3v_train.configuration_phi3_v import Phi3VConfig

    from tests.train.parity import PARITY

    config = Phi3VConfig.from_pretrained(PARITY / "phi-3.5-vision")
    with torch.device("meta"):
        model = Phi3VForCausalLM(config)
        settings = peft.LoraConfig(r=4, target_modules=OFFICIAL_LINEARS, task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(model, settings)  # pyright: ignore[reportArgumentType]
    official: dict[str, list[int]] = read_json("phi-3.5-vision/state_dict_index.json")["keys"]
    adapters = {
        name: weight.shape
        for name, weight in peft.get_peft_model_state_dict(
            adapted, save_embedding_layers=False
        ).items()
    }
    # 32 decoder layers of 4, 24 vision layers of 6, the projector's 2, the head.
    assert len(adapters) == 2 * (32 * 4 + 24 * 6 + 2 + 1)
    for name, shape in adapters.items():
        module, side, _ = name.removeprefix("base_model.model.").rsplit(".", 2)
        rows, columns = official[f"{module}.weight"]
        assert list(shape) == ([4, columns] if side == "lora_A" else [rows, 4])


def test_a_saved_adapter_gives_back_the_logits_it_had(base: Path, adapter: Path) -> None:
    plain = Phi3VForCausalLM.from_pretrained(base).eval()
    unadapted = logits_of(plain)
    expected = logits_of(with_adapters(Phi3VForCausalLM.from_pretrained(base)))
    again = peft.PeftModel.from_pretrained(plain, str(adapter))  # pyright: ignore[reportArgumentType]
    assert torch.equal(logits_of(again.eval()), expected)
    assert float((expected - unadapted).abs().max()) > 0.1


def test_an_adapter_folder_alone_finds_its_base(adapter: Path) -> None:
    import phi3v_train

    assert phi3v_train.Phi3VForCausalLM  # the import that makes the class known to Auto classes
    found = peft.AutoPeftModelForCausalLM.from_pretrained(str(adapter))
    assert isinstance(found.get_base_model(), Phi3VForCausalLM)
    (expected,) = (with_adapters(small_model()),)
    assert torch.equal(logits_of(found.eval()), logits_of(expected))


def test_the_models_own_adapter_methods_load_it_too(base: Path, adapter: Path) -> None:
    model = Phi3VForCausalLM.from_pretrained(base).eval()
    model.load_adapter(str(adapter))  # pyright: ignore[reportCallIssue]
    assert torch.equal(logits_of(model), logits_of(with_adapters(small_model())))


def test_adapted_generation_takes_images(adapter: Path, base: Path) -> None:
    adapted = with_adapters(Phi3VForCausalLM.from_pretrained(base))
    inputs = call_inputs(*PROMPTS)
    settings: dict[str, Any] = {"max_new_tokens": 4, "num_return_sequences": 2, "num_beams": 2}
    tokens = adapted.generate(**inputs, **settings)
    merged = adapted.merge_and_unload()
    assert tokens.tolist() == merged.generate(**inputs, **settings).tolist()
    del adapter


def test_merged_weights_have_the_official_names_and_the_adapters_logits(
    base: Path, tmp_path: Path
) -> None:
    adapted = with_adapters(Phi3VForCausalLM.from_pretrained(base))
    expected = logits_of(adapted)
    merged = adapted.merge_and_unload()
    assert isinstance(merged, Phi3VForCausalLM)
    torch.testing.assert_close(logits_of(merged), expected, atol=1e-5, rtol=0)
    merged.save_pretrained(tmp_path)
    before, after = (load_file(d / "model.safetensors") for d in (base, tmp_path))
    assert before.keys() == after.keys()
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    again = Phi3VForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits_of(again), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["none", "new", "reentrant"])
def test_every_adapter_gets_a_gradient_with_and_without_checkpointing(
    base: Path, checkpointing: bool | None
) -> None:
    # With a frozen embedding, reentrant checkpointing once left the vision tower's adapters out.
    plain = with_adapters(Phi3VForCausalLM.from_pretrained(base)).train()
    plain.get_base_model().packed_loss(packed_row(*PROMPTS)).backward()
    expected = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}
    adapted = with_adapters(Phi3VForCausalLM.from_pretrained(base)).train()
    if checkpointing is not None:
        adapted.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    adapted.get_base_model().packed_loss(packed_row(*PROMPTS)).backward()
    never = "vision_model.encoder.layers.2."
    for name, weight in adapted.named_parameters():
        if weight.requires_grad and never not in name:
            assert weight.grad is not None, name
            assert float(weight.grad.abs().max()) > 0, name
            torch.testing.assert_close(weight.grad, expected[name], atol=1e-6, rtol=1e-5)


def test_an_adapter_of_another_size_is_refused(adapter: Path) -> None:
    torch.manual_seed(0)
    other = Phi3VForCausalLM(small_config(intermediate_size=192))
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(other, str(adapter))  # pyright: ignore[reportArgumentType]
