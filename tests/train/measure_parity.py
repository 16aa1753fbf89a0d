"""How far this model is from the published code's recorded numbers: the table of docs/model.md.

    uv run python -m tests.train.measure_parity

The recordings are looked for in `../shared/parity` beside the checkout. The tests hold each figure
to its tolerance; this prints the largest one seen.
"""

import json
import sys
from typing import cast

import numpy as np
import torch
from phi3v_train.hd_transform import hd_image, hd_layout
from phi3v_train.processing_phi3_v import Phi3VProcessor
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.train.parity import (
    FORWARD_CASES,
    PARITY,
    inputs_of,
    model_inputs,
    model_of,
    probe,
    read_case,
    read_json,
    real_positions,
    run_lengths,
)

NOISE = 1e-6
"""Gradients below this are rounding noise, in the reference too."""


def far(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.detach().double() - theirs.double()).abs().max())


def measure_forward(implementation: str) -> dict[str, float]:
    columns = load_file(PARITY / "model/columns.safetensors")["vocabulary_columns"]
    names = ("logits", "loss", "image features", "gradient norm", "probe")
    worst: dict[str, float] = dict.fromkeys(names, 0.0)

    def note(name: str, value: float) -> None:
        worst[name] = max(worst[name], value)

    for name in FORWARD_CASES:
        case = read_case(name)
        model = model_of(name, implementation).train()
        features: list[Tensor] = []
        model.model.vision_embed_tokens.register_forward_hook(
            lambda _module, _inputs, output, seen=features: seen.append(cast("Tensor", output))
        )
        output = model(**inputs_of(name, case))
        output.loss.backward()
        real = real_positions(case)
        note("logits", far(output.logits[real][:, columns], case["logits_columns"][real]))
        note("loss", far(output.loss, case["loss"][0]))
        if "image_features" in case:
            note("image features", far(features[0], case["image_features"]))
        recorded = read_json(f"model/{name}.grads.json")["gradients"]
        for key, parameter in model.named_parameters():
            expected, gradient = recorded[key], parameter.grad
            if expected is None or gradient is None or expected["norm"] < NOISE:
                assert (expected is None) == (gradient is None), key
                continue
            norm = expected["norm"]
            note("gradient norm", abs(float(gradient.double().norm()) - norm) / norm)
            note("probe", abs(probe(gradient) - expected["probe"]) / norm)
    return worst


def measure_generation(implementation: str) -> tuple[float, int, int]:
    """(largest distance of a logit, tokens that are equal, tokens)."""
    columns = load_file(PARITY / "model/columns.safetensors")["vocabulary_columns"]
    worst, equal, count = 0.0, 0, 0
    for name in (
        "generate_image",
        "generate_batch_left_padded",
        "generate_across_rope_limit",
    ):
        case = read_case(name)
        num_new = read_json("model/cases.json")[name]["max_new_tokens"]
        for use_cache in (True, False):
            output = model_of(name, implementation).generate(  # pyright: ignore[reportAttributeAccessIssue]
                **model_inputs(case, "input_ids", "attention_mask", "pixel_values", "image_sizes"),
                max_new_tokens=num_new,
                do_sample=False,
                use_cache=use_cache,
                eos_token_id=32063,
                output_logits=True,
                return_dict_in_generate=True,
            )
            tokens = output.sequences[:, -num_new:]
            equal += int((tokens == case["new_tokens"]).sum())
            count += tokens.numel()
            steps = torch.stack(output.logits, dim=1)[..., columns]
            worst = max(worst, far(steps, case["step_logits_columns"]))
    return worst, equal, count


def measure_pixels() -> tuple[int, int, float]:
    """(pictures whose HD image is equal, pictures, largest distance of a pixel value)."""
    worst, equal = 0.0, 0
    cases = read_json("processor/cases.json")["cases"]
    for case in cases:
        picture = Image.open(PARITY / "processor" / case["image"])
        recorded = load_file(PARITY / "processor" / case["tensors"])
        hd = np.asarray(Image.open(PARITY / "processor" / case["hd_image"]))
        folder = PARITY / "phi-3.5-vision"
        processor = Phi3VProcessor.from_pretrained(folder, num_crops=case["num_crops"])
        equal += np.array_equal(hd_image(picture.convert("RGB"), case["num_crops"]), hd)
        pixels = processor.image_processor(picture)["pixel_values"][0]
        sample = pixels.flatten()[recorded["sample_index"]]
        worst = max(worst, far(sample, recorded["sample_value"]))
        worst = max(worst, far(pixels[0, :, ::2, ::2], recorded["global_view_stride2"]))
    return equal, len(cases), worst


def measure_sizes() -> tuple[int, int]:
    """(cells of the size grid and rows of the table that are equal, all of them)."""
    equal = count = 0
    grid = load_file(PARITY / "processor/size_grid.safetensors")
    axis = grid["axis"].tolist()
    for name, table in grid.items():
        if name == "axis":
            continue
        num_crops = int(name.rsplit("_", 1)[1])
        for i, width in enumerate(axis):
            for j, height in enumerate(axis):
                expected = tuple(table[i, j].tolist())
                try:
                    found = hd_layout(width, height, num_crops).canvas_hw
                except ValueError:
                    found = None
                count += 1
                equal += found == expected if all(expected) else found is None
    for row in read_json("processor/sizes.json")["rows"]:
        layout = hd_layout(row["width"], row["height"], row["num_crops"])
        count += 1
        equal += (*layout.canvas_hw, layout.num_tokens) == (
            *row["image_size_hw"],
            row["num_img_tokens"],
        )
    return equal, count


def measure_prompts() -> tuple[int, int, int]:
    """(prompts with equal ids, prompts, prompts refused for their image tags)."""
    equal = refused = count = 0
    for case in read_json("chat/conversations.json")["conversations"]:
        folder = PARITY / "phi-3.5-vision"
        processor = Phi3VProcessor.from_pretrained(folder, num_crops=case["num_crops"])
        pictures = [Image.open(PARITY / "chat" / name) for name in case["images"]]
        count += 1
        try:
            ids = processor(case["text"], pictures)["input_ids"][0].tolist()
        except ValueError:
            refused += 1
            continue
        equal += ids == run_lengths(case["input_ids_rle"])
    return equal, count, refused


def main() -> int:
    if not PARITY.is_dir():
        print("no recordings in ../shared/parity beside this checkout", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    equal, count = measure_sizes()
    print(f"sizes, grids, token counts equal   {equal:,} of {count:,}")
    equal, count, pixel = measure_pixels()
    print(f"HD images equal                    {equal} of {count}")
    print(f"pixel values                       {pixel:.1e}")
    equal, count, refused = measure_prompts()
    print(f"prompt ids equal                   {equal} of {count}, {refused} refused")
    result = {}
    for implementation in ("sdpa", "eager"):
        result[implementation] = measure_forward(implementation)
        step, equal, count = measure_generation(implementation)
        for name, value in result[implementation].items():
            print(f"{implementation:5} {name:28} {value:.1e}")
        print(f"{implementation:5} {'logits of generated tokens':28} {step:.1e}")
        print(f"{implementation:5} {'generated tokens equal':28} {equal} of {count}")
    print(json.dumps({"torch": torch.__version__, "python": sys.version.split()[0]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
