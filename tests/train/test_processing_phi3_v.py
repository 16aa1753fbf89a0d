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
