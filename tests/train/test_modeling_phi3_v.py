from typing import Any, cast

import numpy as np
import pytest
import torch
from phi3v_train.collator import EncodedSample, collate
from phi3v_train.configuration_phi3_v import Phi3VConfig
from phi3v_train.modeling_phi3_v import (
    Phi3VForCausalLM,
    merge_patches,
    sample_lengths,
    tile_crops,
)
from safetensors.torch import load_file
from torch import Tensor

from tests.train.parity import (
    FORWARD_CASES,
    PARITY,
    inputs_of,
    model_inputs,
    model_of,
    needs_parity,
    probe,
    read_case,
    read_json,
    real_positions,
)
from tests.train.small_models import small_model

LONG_CASES = ["rope_len_64", "rope_len_65", "rope_padded_batch_row1_alone"]


def assert_logits(logits: Tensor, case: dict[str, Tensor], columns: Tensor) -> None:
    real = real_positions(case)
    expected = case["logits_columns"][real]
    torch.testing.assert_close(logits[real][:, columns], expected, atol=1e-4, rtol=0)
    sums = logits.logsumexp(-1)
    torch.testing.assert_close(sums[real], case["logits_logsumexp"][real], atol=1e-4, rtol=0)
    for row, position in enumerate(case["last_position"].tolist()):
        torch.testing.assert_close(
            logits[row, position], case["logits_last"][row], atol=1e-4, rtol=0
        )


@pytest.fixture
def columns() -> Tensor:
    return load_file(PARITY / "model/columns.safetensors")["vocabulary_columns"]


@needs_parity
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FORWARD_CASES)
def test_logits_loss_and_image_features_equal_the_reference(
    name: str, implementation: str, columns: Tensor
) -> None:
    case = read_case(name)
    model = model_of(name, implementation)
    features: list[Tensor] = []
    model.model.vision_embed_tokens.register_forward_hook(
        lambda _module, _inputs, output: features.append(cast("Tensor", output))
    )
    with torch.no_grad():
        output = model(**inputs_of(name, case))
    assert output.loss is not None
    torch.testing.assert_close(output.loss, case["loss"][0], atol=2e-5, rtol=0)
    assert output.logits is not None
    assert_logits(output.logits, case, columns)
    if "image_features" in case:
        torch.testing.assert_close(features[0], case["image_features"], atol=5e-5, rtol=0)


@needs_parity
@pytest.mark.parametrize("name", FORWARD_CASES)
def test_gradients_equal_the_reference(name: str) -> None:
    case = read_case(name)
    model = model_of(name).train()
    model(**inputs_of(name, case)).loss.backward()
    recorded = read_json(f"model/{name}.grads.json")["gradients"]
    for key, expected in recorded.items():
        gradient = dict(model.named_parameters())[key].grad
        if expected is None:
            assert gradient is None, f"{key} has a gradient, the reference has none"
            continue
        assert gradient is not None, f"{key} has no gradient"
        # A key bias moves no softmax: its gradient is rounding noise, in the reference too.
        noise = 1e-6
        norm = float(gradient.double().norm())
        assert norm == pytest.approx(expected["norm"], rel=2e-5, abs=noise), key
        assert probe(gradient) == pytest.approx(
            expected["probe"], rel=0, abs=5e-5 * expected["norm"] + noise
        ), key


@needs_parity
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    "name", ["generate_image", "generate_batch_left_padded", "generate_across_rope_limit"]
)
def test_greedy_generation_gives_the_tokens_of_the_reference(
    name: str, use_cache: bool, implementation: str, columns: Tensor
) -> None:
    case = read_case(name)
    model = model_of(name, implementation)
    names = ("input_ids", "attention_mask", "pixel_values", "image_sizes")
    count = read_json("model/cases.json")[name]["max_new_tokens"]
    output = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
        **model_inputs(case, *names),
        max_new_tokens=count,
        do_sample=False,
        use_cache=use_cache,
        eos_token_id=32063,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert output.sequences[:, -count:].tolist() == case["new_tokens"].tolist()
    steps = torch.stack(output.logits, dim=1)[..., columns]
    torch.testing.assert_close(steps, case["step_logits_columns"], atol=1e-4, rtol=0)


@needs_parity
def test_padding_does_not_switch_a_short_row_to_the_long_factors(columns: Tensor) -> None:
    case = read_case("rope_padded_batch")
    alone = read_case("rope_padded_batch_row1_alone")
    with torch.no_grad():
        logits = model_of("rope_padded_batch")(**model_inputs(case)).logits
    torch.testing.assert_close(logits[0][:, columns], case["logits_columns"][0], atol=1e-4, rtol=0)
    length = alone["input_ids"].shape[1]
    torch.testing.assert_close(
        logits[1, :length, columns], alone["logits_columns"][0], atol=1e-4, rtol=0
    )


# --- in a bare clone: a tiny model made on the spot -----------------------------------------------


def tiny_model(seed: int = 0) -> Phi3VForCausalLM:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "original_max_position_embeddings": 400,
        "max_position_embeddings": 4096,
        "rope_scaling": {
            "type": "su",
            "short_factor": [1.0 + 0.1 * i for i in range(8)],
            "long_factor": [1.0 + 2.0 * i for i in range(8)],
        },
        "initializer_range": 0.1,
        "pad_token_id": 0,
        "image_token_id": 5,
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
        },
    }
    return Phi3VForCausalLM(Phi3VConfig(**settings)).eval()


def sample_of(name: str, grid: list[tuple[int, int]], num_text: int, seed: int) -> EncodedSample:
    random = np.random.default_rng(seed)
    num_crops = sum(rows * columns for rows, columns in grid)
    slots = sum((r * c + 1) * 144 + 1 + (r + 1) * 12 for r, c in grid)
    text = random.integers(6, 128, num_text)
    ids = np.concatenate([text[:3], np.full(slots, 5), text[3:]]).astype(np.int64)
    return EncodedSample(
        sample_id=name,
        input_ids=ids,
        labels=np.concatenate([np.full(len(ids) - 4, -100), text[-4:]]).astype(np.int64),
        crops=random.integers(0, 256, (num_crops, 3, 336, 336), dtype=np.uint8),
        crop_grid=np.array(grid, dtype=np.int32).reshape(-1, 2),
    )


SAMPLES = [
    sample_of("one image", [(1, 1)], 20, 1),  # within the original limit
    sample_of("text only", [], 30, 2),
    sample_of("two images", [(1, 2), (2, 1)], 25, 3),  # beyond it: long factors
    sample_of("short text", [], 9, 4),
]


def official_inputs(sample: EncodedSample, model: Phi3VForCausalLM) -> dict[str, Tensor]:
    """The same sample in the published call's format, alone."""
    from phi3v_train.modeling_phi3_v import normalize_views

    inputs = {
        "input_ids": torch.from_numpy(sample.input_ids)[None],
        "labels": torch.from_numpy(sample.labels)[None],
    }
    grid = [(int(r), int(c)) for r, c in sample.crop_grid]
    if grid:
        views, local = normalize_views(torch.from_numpy(sample.crops), grid)
        most = max(r * c for r, c in grid)
        pixels = torch.zeros(len(grid), most + 1, 3, 336, 336)
        pixels[:, 0] = views
        for image, own in enumerate(local.split([r * c for r, c in grid])):
            pixels[image, 1 : 1 + len(own)] = own
        inputs |= {"pixel_values": pixels, "image_sizes": torch.tensor(grid) * 336}
    return inputs


def test_a_packed_row_gives_each_sample_the_loss_it_has_alone() -> None:
    model = tiny_model()
    with torch.no_grad():
        alone = [model(**official_inputs(sample, model)).loss * 4 for sample in SAMPLES]
        packed = model.packed_loss(collate(SAMPLES))
        order = model.packed_loss(collate(SAMPLES[::-1]))
    torch.testing.assert_close(packed, torch.stack(alone).sum(), atol=1e-4, rtol=1e-6)
    torch.testing.assert_close(order, packed, atol=1e-4, rtol=1e-6)


def test_a_packed_row_gives_each_sample_the_hidden_states_it_has_alone() -> None:
    model = tiny_model()
    row = collate(SAMPLES)
    with torch.no_grad():
        packed = model.model.packed(row)
        bounds = row.cu_seqlens.tolist()
        for sample, start, stop in zip(SAMPLES, bounds[:-1], bounds[1:], strict=True):
            alone = model.model.packed(collate([sample]))
            torch.testing.assert_close(packed[start:stop], alone, atol=1e-5, rtol=0)


def test_a_row_without_images_gives_every_vision_weight_a_zero_gradient() -> None:
    model = tiny_model().train()
    model.packed_loss(collate([SAMPLES[1]])).backward()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            assert weight.grad is not None, name
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    projection = gradients["model.vision_embed_tokens.img_projection.0.weight"]
    assert projection is not None
    assert torch.count_nonzero(projection) == 0


def test_saved_weights_have_the_official_names_and_load_again(tmp_path: object) -> None:
    model = tiny_model()
    model.save_pretrained(str(tmp_path))
    saved = load_file(f"{tmp_path}/model.safetensors")
    assert "model.vision_embed_tokens.img_processor.vision_model.post_layernorm.weight" in saved
    assert "model.vision_embed_tokens.wte.weight" not in saved
    again = Phi3VForCausalLM.from_pretrained(str(tmp_path))
    assert again.config.to_dict() == {**model.config.to_dict(), "torch_dtype": "float32"}
    with torch.no_grad():
        for batch in (collate(SAMPLES), collate(SAMPLES[:1])):
            assert torch.equal(model.packed_loss(batch), again.eval().packed_loss(batch))


@needs_parity
def test_the_real_config_has_exactly_the_official_names_and_shapes() -> None:
    config = Phi3VConfig.from_pretrained(PARITY / "phi-3.5-vision")
    with torch.device("meta"):
        model = Phi3VForCausalLM(config)
    index = read_json("phi-3.5-vision/state_dict_index.json")
    expected = {k: v for k, v in index["keys"].items() if k not in index["aliases"]}
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == expected


@needs_parity
def test_a_written_config_says_what_the_official_one_says(tmp_path: object) -> None:
    Phi3VConfig.from_pretrained(PARITY / "phi-3.5-vision").save_pretrained(str(tmp_path))
    official = read_json("phi-3.5-vision/config.json")
    import json

    written = json.loads(open(f"{tmp_path}/config.json").read())
    left_out = {"_attn_implementation", "transformers_version", "_name_or_path"}
    assert {k: written.get(k) for k in official if k not in left_out} == {
        k: v for k, v in official.items() if k not in left_out
    }
    assert set(written) - set(official) == {"image_token_id"}


def test_as_many_slots_as_image_tokens_are_needed() -> None:
    model = tiny_model()
    inputs = official_inputs(SAMPLES[0], model)
    inputs["input_ids"] = inputs["input_ids"][:, 10:]
    inputs.pop("labels")
    with pytest.raises(ValueError, match="image slots, the 1 images have 313 tokens"):
        model(**inputs)


def test_patches_merge_two_by_two_and_crops_tile_to_the_image() -> None:
    # One number per patch of a 2 x 1 grid of crops: its place in the whole image.
    whole = torch.arange(48 * 24).view(48, 24)
    crops = whole.view(2, 24 * 24)[..., None].float()
    tiled = tile_crops(merge_patches(crops), 2, 1)
    assert tiled.shape == (24, 12, 4)
    assert tiled[20, 3].tolist() == [whole[40, 6], whole[40, 7], whole[41, 6], whole[41, 7]]


def test_a_sample_is_as_long_as_its_real_tokens_on_either_side_of_the_padding() -> None:
    positions = torch.arange(6).expand(3, -1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 1, 0]])
    assert sample_lengths(positions, mask).tolist() == [3, 4, 5]
    assert sample_lengths(positions, None).tolist() == [6, 6, 6]
    assert sample_lengths(torch.tensor([[5]] * 3), mask).tolist() == [3, 4, 5]


def test_padding_in_front_changes_no_logit_beyond_the_rope_limit() -> None:
    model = small_model(original_max_position_embeddings=32).eval()
    ids = torch.randint(3, 100, (1, 20), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([torch.zeros(1, 20, dtype=torch.int64), ids], dim=1)
    mask = (torch.arange(40) >= 20).long()[None]
    with torch.no_grad():
        alone = model(input_ids=ids).logits
        beside = model(input_ids=padded, attention_mask=mask).logits[:, 20:]
    torch.testing.assert_close(beside, alone, atol=1e-4, rtol=0)


def test_pixels_beside_embeddings_are_refused() -> None:
    model = small_model()
    pixels = torch.zeros(1, 2, 3, 336, 336)
    embeddings = torch.zeros(1, 5, model.config.hidden_size)
    with pytest.raises(ValueError, match="expected no pixel_values beside inputs_embeds"):
        model(inputs_embeds=embeddings, pixel_values=pixels, image_sizes=torch.tensor([[336, 336]]))
