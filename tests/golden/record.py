"""The project's own golden numbers: what makes them, and how to record them anew.

    uv run python -m tests.golden.record

Weights, ids and pixels are formulas, so nothing depends on a random generator's version. The file
was recorded when the model held every recorded case of the reference (tests/train/parity.py, which
needs files too large for the repository); record it again only after a run that still holds them.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from phi3v_train.collator import Batch, EncodedSample, collate
from phi3v_train.configuration_phi3_v import Phi3VConfig
from phi3v_train.hd_transform import hd_crops, hd_image, hd_layout
from phi3v_train.modeling_phi3_v import Phi3VForCausalLM
from PIL import Image

GOLDEN = Path(__file__).with_name("golden.json")

SETTINGS: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    # One of the two samples exceeds it: short and long factors in one row.
    "original_max_position_embeddings": 200,
    "max_position_embeddings": 2000,
    "rope_scaling": {
        "type": "su",
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [1.0 + 3.0 * i for i in range(8)],
    },
    "pad_token_id": 0,
    "image_token_id": 5,
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    },
}


def golden_model() -> Phi3VForCausalLM:
    """A small model whose weights are cosines of their place."""
    model = Phi3VForCausalLM(Phi3VConfig(**SETTINGS)).eval()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            places = torch.arange(parameter.numel(), dtype=torch.float64)
            values = torch.cos(places * (0.7 + 0.01 * number) + places.sqrt())
            # Matrices keep the size of what goes through them; vectors stay near one.
            scale = 1.5 / math.sqrt(parameter.shape[-1]) if parameter.ndim > 1 else 0.1
            base = 0.0 if parameter.ndim > 1 else 1.0
            parameter.copy_((base + scale * values).view(parameter.shape).float())
    return model


def golden_picture() -> Image.Image:
    """A portrait of waves, 61 x 97."""
    rows, columns = np.mgrid[0:97, 0:61].astype(np.float64)
    channels = [np.sin(rows / (3 + c)) + np.cos(columns / (5 - c)) for c in range(3)]
    return Image.fromarray(np.round(np.stack(channels, -1) * 60 + 128).astype(np.uint8))


def golden_batch() -> Batch:
    """A sample with a picture of four crops and one without, in a row."""
    picture = golden_picture()
    crops = hd_crops(picture, 4)
    grid = np.array([hd_layout(*picture.size, 4).grid], dtype=np.int32)
    slots = (len(crops) + 1) * 144 + 1 + (int(grid[0, 0]) + 1) * 12
    text = [6 + 7 * k % 90 for k in range(24)]
    with_picture = np.array(text[:4] + [5] * slots + text[4:])
    alone = np.array([6 + 11 * k % 90 for k in range(20)])
    none = np.zeros((0, 3, 336, 336), dtype=np.uint8)
    return collate(
        [
            EncodedSample("picture", with_picture, _answers(with_picture), crops, grid),
            EncodedSample("text", alone, _answers(alone), none, grid[:0]),
        ]
    )


def _answers(ids: np.ndarray) -> np.ndarray:
    return np.where(np.arange(len(ids)) >= len(ids) - 6, ids, -100)


def measure() -> dict[str, Any]:
    """The numbers, from the code as it is."""
    model, batch = golden_model(), golden_batch()
    with torch.no_grad():
        hidden = model.model.packed(batch)
        logits = model.lm_head(hidden[-3:])
    loss = model.packed_loss(batch)
    loss.backward()
    canvas = hd_image(golden_picture(), 4)
    return {
        "canvas_hw": list(canvas.shape[:2]),
        "canvas_sum": int(canvas.astype(np.int64).sum()),
        "canvas_diagonal": canvas[range(0, 336, 24), range(0, 336, 24), 0].tolist(),
        "loss_sum": loss.item(),
        "last_logits": logits.tolist(),
        "hidden_norm": [round(float(x), 6) for x in hidden.norm(dim=-1)[::37]],
        "gradient_norms": {
            name: float(parameter.grad.double().norm())
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        },
    }


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(measure(), indent=1) + "\n")
