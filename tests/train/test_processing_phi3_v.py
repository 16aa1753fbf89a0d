import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from phi3v_data.images import upright_rgb
from phi3v_train.hd_transform import hd_image
from phi3v_train.processing_phi3_v import Phi3VProcessor
from PIL import Image
from safetensors.torch import load_file

from tests.train.parity import PARITY, needs_parity, read_json, run_lengths

CASES = read_json("processor/cases.json")["cases"] if PARITY.is_dir() else []
CHATS = read_json("chat/conversations.json") if PARITY.is_dir() else {"conversations": []}


def processor(num_crops: int) -> Phi3VProcessor:
    return Phi3VProcessor.from_pretrained(PARITY / "phi-3.5-vision", num_crops=num_crops)


@needs_parity
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['name']}-{case['num_crops']}")
def test_pixels_equal_the_reference(case: dict) -> None:
    image = Image.open(PARITY / "processor" / case["image"])
    recorded = load_file(PARITY / "processor" / case["tensors"])
    hd = np.asarray(Image.open(PARITY / "processor" / case["hd_image"]))
    assert np.array_equal(hd_image(upright_rgb(image), case["num_crops"]), hd)
    inputs = processor(case["num_crops"])("<|user|>\n<|image_1|>\nx<|end|>\n", [image])
    pixels = inputs["pixel_values"]
    assert list(pixels.shape) == case["pixel_values_shape"]
    assert int((inputs["input_ids"] == -1).sum()) == case["num_img_tokens"]
    assert inputs["image_sizes"].tolist() == recorded["image_sizes"].tolist()
    flat = pixels[0].flatten()
    torch.testing.assert_close(
        flat[recorded["sample_index"]], recorded["sample_value"], atol=2e-6, rtol=0
    )
    torch.testing.assert_close(
        pixels[0, 0, :, ::2, ::2], recorded["global_view_stride2"], atol=2e-6, rtol=0
    )
    torch.testing.assert_close(
        pixels[0].double().mean(dim=(1, 2, 3)), recorded["crop_mean"], atol=2e-6, rtol=0
    )


@needs_parity
@pytest.mark.parametrize("case", CHATS["conversations"], ids=lambda case: case["name"])
def test_prompt_ids_equal_the_reference(case: dict) -> None:
    images = [Image.open(PARITY / "chat" / name) for name in case["images"]]
    ids = run_lengths(case["input_ids_rle"])
    order = [i for i, _ in case["input_ids_rle"] if i < 0]
    if order != [-n for n in range(1, len(images) + 1)]:
        with pytest.raises(ValueError, match="once each and in order"):
            processor(case["num_crops"])(case["text"], images)
        return
    assert processor(case["num_crops"])(case["text"], images)["input_ids"][0].tolist() == ids


@needs_parity
@pytest.mark.parametrize("case", CHATS.get("rejected", []), ids=lambda case: case["name"])
def test_what_the_reference_rejects_is_a_value_error_here(case: dict) -> None:
    images = [Image.open(PARITY / "chat" / name) for name in case["images"]]
    if not images and "<|image_" not in case["text"]:
        processor(4)(case["text"], images)  # text alone is fine here
        return
    with pytest.raises(ValueError, match="image tags"):
        processor(4)(case["text"], images)


# --- in a bare clone ------------------------------------------------------------------------------


@pytest.fixture
def door(tiny: Path) -> Phi3VProcessor:
    return Phi3VProcessor.from_pretrained(tiny, num_crops=2)


def colour(name: str, size: tuple[int, int] = (40, 40)) -> Image.Image:
    return Image.new("RGB", size, name)


def prompt(*numbers: int) -> str:
    tags = "".join(f"<|image_{n}|>" for n in numbers)
    return f"<|user|>\n{tags}\nWhat is it?<|end|>\n<|assistant|>\n"


def test_one_prompt_takes_the_published_shapes(door: Phi3VProcessor) -> None:
    inputs = door(prompt(1, 2), [colour("red"), colour("blue", (80, 40))], return_tensors="pt")
    assert inputs["pixel_values"].shape == (2, 3, 3, 336, 336)
    assert inputs["image_sizes"].tolist() == [[336, 336], [336, 672]]
    ids = inputs["input_ids"]
    assert ids.shape == inputs["attention_mask"].shape == (1, ids.shape[1])
    assert [int((ids == -n).sum()) for n in (1, 2)] == [313, 457]
    assert (inputs["pixel_values"][0, 2] == 0).all()  # the first image has one crop


def test_text_alone_needs_no_images(door: Phi3VProcessor) -> None:
    assert set(door("<|user|>\nHello<|end|>\n")) == {"input_ids", "attention_mask"}


def test_a_batch_is_padded_in_front_and_each_prompt_is_as_it_is_alone(door: Phi3VProcessor) -> None:
    red, blue = colour("red"), colour("blue")
    texts = [prompt(1), prompt(1, 2), "<|user|>\nHello<|end|>\n"]
    alone = [door(texts[0], red), door(texts[1], [red, blue]), door(texts[2])]
    for images in ([[red], [red, blue], []], [[red], [red, blue], None], [red, red, blue]):
        batch = door(texts, images, padding=True)
        for row, one in enumerate(alone):
            length = one["input_ids"].shape[1]
            assert batch["input_ids"][row, -length:].tolist() == one["input_ids"][0].tolist()
            assert batch["attention_mask"][row].sum() == length
            assert batch["attention_mask"][row, -length:].all()
        pixels = torch.cat([alone[0]["pixel_values"], alone[1]["pixel_values"]])
        assert torch.equal(batch["pixel_values"], pixels)
    right = door(texts, images, padding=True, padding_side="right")
    assert right["attention_mask"][2, 0] == 1
    assert right["attention_mask"][2, -1] == 0


def test_messages_with_pictures_make_the_inputs_of_the_rendered_prompt(
    door: Phi3VProcessor, tmp_path: Path
) -> None:
    colour("red").save(tmp_path / "a.png")
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "path": str(tmp_path / "a.png")},
                {"type": "image", "image": colour("blue")},
                {"type": "text", "text": "What is it?"},
            ],
        }
    ]
    expected = door(prompt(1, 2), [colour("red"), colour("blue")])
    inputs = door.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert set(inputs) == set(expected)
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    ids = door.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    assert torch.equal(ids, expected["input_ids"])
    assert door.apply_chat_template(messages, add_generation_prompt=True) == prompt(1, 2)


def test_the_published_strings_take_their_pictures_apart(door: Phi3VProcessor) -> None:
    messages = [{"role": "user", "content": "<|image_1|>\nWhat is it?"}]
    inputs = door.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        images=[colour("red")],
    )
    assert torch.equal(inputs["input_ids"], door(prompt(1), colour("red"))["input_ids"])


def test_a_batch_of_conversations_is_encoded_together(door: Phi3VProcessor) -> None:
    entry = {"type": "image", "image": colour("red")}
    one = [{"role": "user", "content": [entry, {"type": "text", "text": "What is it?"}]}]
    two = [{"role": "user", "content": "Hello"}]
    inputs = door.apply_chat_template(
        [one, two], add_generation_prompt=True, tokenize=True, return_dict=True, padding=True
    )
    assert inputs["input_ids"].shape[0] == 2
    assert inputs["pixel_values"].shape[0] == 1


@pytest.mark.parametrize(
    ("numbers", "count", "reason"),
    [
        ((1, 3), 2, r"once each and in order, got \[1, 3\]"),
        ((2, 1), 2, r"once each and in order, got \[2, 1\]"),
        ((1, 1), 2, r"once each and in order, got \[1, 1\]"),
        ((1,), 2, "as many image tags as images, got 1 image tags and 2 images"),
        ((1, 2), 0, "as many image tags as images, got 2 image tags and 0 images"),
    ],
)
def test_tags_and_images_must_match(
    door: Phi3VProcessor, numbers: tuple[int, ...], count: int, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        door(prompt(*numbers), [colour("red")] * count)


def test_too_many_tokens_for_the_context_say_what_to_change(door: Phi3VProcessor) -> None:
    with pytest.raises(ValueError, match=r"313 of them for images; the limit is 300; use fewer"):
        door(prompt(1), colour("red"), max_length=300)
    limit = door.tokenizer.model_max_length
    with pytest.raises(ValueError, match=f"the limit is {limit:,}"):
        door("x " * limit)


def test_an_unreadable_image_is_one_clear_error(door: Phi3VProcessor, tmp_path: Path) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"\xff\xd8\xff broken")
    with pytest.raises(ValueError, match=r"cannot read the image .*broken\.jpg"):
        door(prompt(1), str(path))


def test_what_cannot_be_done_is_refused(door: Phi3VProcessor) -> None:
    with pytest.raises(ValueError, match="padding=True"):
        door(["<|user|>\nHello", "<|user|>\nHello you there"])
    with pytest.raises(ValueError, match="truncation would cut"):
        door("<|user|>\nHello", truncation=True)
    with pytest.raises(ValueError, match="too long and thin"):
        door(prompt(1), colour("red", (2000, 1)))
    with pytest.raises(ValueError, match="2 prompts need as many lists of images, got 1"):
        door([prompt(1), prompt(1)], [[colour("red"), colour("red")]])


def test_a_saved_processor_is_the_published_layout_and_loads_again(
    door: Phi3VProcessor, tiny: Path, tmp_path: Path
) -> None:
    door.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    published = json.loads((tiny / "preprocessor_config.json").read_text())
    assert saved == published | {"num_crops": 2}
    assert json.loads((tmp_path / "processor_config.json").read_text()) == {
        "processor_class": "Phi3VProcessor"
    }
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = Phi3VProcessor.from_pretrained(tmp_path)
    assert again.image_processor.num_crops == 2
    inputs, expected = again(prompt(1), colour("red")), door(prompt(1), colour("red"))
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    messages = [{"role": "user", "content": "Hello"}]
    assert again.apply_chat_template(messages) == door.apply_chat_template(messages)


def test_a_tokenizer_that_rebuilds_the_pipeline_is_refused(tiny: Path) -> None:
    from transformers import LlamaTokenizer

    rebuilt = LlamaTokenizer.from_pretrained(tiny)
    with pytest.raises(ValueError, match=r"LlamaTokenizer rebuilds the pipeline"):
        Phi3VProcessor(Phi3VProcessor.from_pretrained(tiny).image_processor, rebuilt)


def test_other_means_than_the_models_are_refused() -> None:
    from phi3v_train.image_processing_phi3_v import Phi3VImageProcessor

    with pytest.raises(ValueError, match="expected CLIP's image_mean"):
        Phi3VImageProcessor(image_mean=(0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="num_crops: expected at least 1"):
        Phi3VImageProcessor(num_crops=0)


def test_generated_ids_decode_with_the_prompts_image_slots_left_out(door: Phi3VProcessor) -> None:
    ids = door(prompt(1), colour("red"))["input_ids"]
    text = door.decode(ids[0], skip_special_tokens=True)
    assert "What is it?" in text
    assert door.batch_decode(ids, skip_special_tokens=True) == [text]
    assert door.decode(ids[0][ids[0] >= 0]) == door.decode(ids[0])


def test_the_image_text_to_text_pipeline_answers(tiny: Path) -> None:
    from transformers import AutoModelForImageTextToText, pipeline

    processor = Phi3VProcessor.from_pretrained(tiny, num_crops=1)
    model = AutoModelForImageTextToText.from_pretrained(tiny)
    ask = pipeline("image-text-to-text", model=model, processor=processor, device="cpu")
    entry = {"type": "image", "image": colour("red")}
    messages = [{"role": "user", "content": [entry, {"type": "text", "text": "What is it?"}]}]
    answer = cast("Any", ask)(text=messages, max_new_tokens=4, return_full_text=False)
    assert isinstance(answer[0]["generated_text"], str)


def test_generation_stops_at_strings(tiny: Path) -> None:
    from phi3v_train.modeling_phi3_v import Phi3VForCausalLM

    processor = Phi3VProcessor.from_pretrained(tiny)
    model = Phi3VForCausalLM.from_pretrained(tiny).eval()
    inputs = processor("<|user|>\nHello<|end|>\n<|assistant|>\n")
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    free = model.generate(**inputs, **options)  # pyright: ignore[reportAttributeAccessIssue]
    start = inputs["input_ids"].shape[1]
    word = processor.tokenizer.decode(free[0, start : start + 3])
    stopped = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
        **inputs, **options, stop_strings=[word], tokenizer=processor.tokenizer
    )
    assert start < stopped.shape[1] < free.shape[1]


def test_a_misspelt_option_of_the_chat_template_is_refused(door: Phi3VProcessor) -> None:
    with pytest.raises(ValueError, match=r"no option and no variable .* 'num_crop'"):
        door.apply_chat_template([{"role": "user", "content": "Hello"}], num_crop=4)
    with pytest.raises(ValueError, match="got one message; put it in a list"):
        door.apply_chat_template({"role": "user", "content": "Hello"})  # pyright: ignore[reportArgumentType]
