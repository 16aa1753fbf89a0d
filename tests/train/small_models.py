"""A model small enough to run in a test, and prompts for it in both of the call's formats."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from phi3v_train.collator import Batch, EncodedSample, collate
from phi3v_train.configuration_phi3_v import Phi3VConfig
from phi3v_train.hd_transform import num_image_tokens
from phi3v_train.modeling_phi3_v import Phi3VForCausalLM, normalize_views
from torch import Tensor

VOCABULARY = 128
IMAGE_TOKEN = 5
PAD = 0
ROPE_LIMIT = 400
"""Tokens up to which the short rotary factors hold: an image takes 313 and more."""

Grid = tuple[int, int]


def small_config(**changes: Any) -> Phi3VConfig:
    """Real structure, widths of 64 and 128 (4-bit quantisation works in blocks of 64)."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "original_max_position_embeddings": ROPE_LIMIT,
        "max_position_embeddings": 4096,
        "rope_scaling": {
            "type": "su",
            "short_factor": [1.0 + 0.1 * i for i in range(8)],
            "long_factor": [1.0 + 2.0 * i for i in range(8)],
        },
        "initializer_range": 0.1,
        "pad_token_id": PAD,
        "eos_token_id": 2,
        "image_token_id": IMAGE_TOKEN,
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
        },
    }
    return Phi3VConfig(**{**settings, **changes})


def small_model(seed: int = 0, **changes: Any) -> Phi3VForCausalLM:
    """A random one, in evaluation mode; no end token is set, so that no answer ends early."""
    torch.manual_seed(seed)
    model = Phi3VForCausalLM(small_config(**changes)).eval()
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


@dataclass(frozen=True)
class Prompt:
    """Text ids with images of noise after the third of them; what the images show is their seed."""

    num_text: int
    grids: tuple[Grid, ...] = ()
    seed: int = 1

    @property
    def text(self) -> list[int]:
        random = np.random.default_rng(self.seed)
        return [int(token) for token in random.integers(6, VOCABULARY, self.num_text)]

    @property
    def ids(self) -> list[int]:
        slots: list[int] = []
        for number, grid in enumerate(self.grids, start=1):
            slots += [-number] * num_image_tokens(*grid)
        return [*self.text[:3], *slots, *self.text[3:]]

    @property
    def crops(self) -> Tensor:
        random = np.random.default_rng(self.seed + 1000)
        count = sum(rows * columns for rows, columns in self.grids)
        return torch.from_numpy(random.integers(0, 256, (count, 3, 336, 336), dtype=np.uint8))


def call_inputs(*prompts: Prompt, uint8: bool = False) -> dict[str, Tensor]:
    """A left-padded batch as the model's call takes it: float views, or uint8 crops."""
    longest = max(len(prompt.ids) for prompt in prompts)
    inputs = {
        "input_ids": torch.tensor([[PAD] * (longest - len(p.ids)) + p.ids for p in prompts]),
        "attention_mask": torch.tensor(
            [[0] * (longest - len(p.ids)) + [1] * len(p.ids) for p in prompts]
        ),
    }
    grids = [grid for prompt in prompts for grid in prompt.grids]
    if not grids:
        return inputs
    crops = torch.cat([prompt.crops for prompt in prompts])
    if uint8:
        return {**inputs, "pixel_values": crops, "crop_grid": torch.tensor(grids)}
    views, local = normalize_views(crops, grids)
    counts = [rows * columns for rows, columns in grids]
    pixels = torch.zeros(len(grids), max(counts) + 1, 3, 336, 336)
    pixels[:, 0] = views
    for image, own in enumerate(local.split(counts)):
        pixels[image, 1 : 1 + len(own)] = own
    return {**inputs, "pixel_values": pixels, "image_sizes": torch.tensor(grids) * 336}


def packed_row(*prompts: Prompt, num_labels: int = 4) -> Batch:
    """The same prompts as a packed row; the last tokens of each are its labels."""
    samples: list[EncodedSample] = []
    for number, prompt in enumerate(prompts):
        ids = np.array(prompt.ids)
        ids[ids < 0] = IMAGE_TOKEN
        labels = np.full(len(ids), -100)
        labels[-num_labels:] = ids[-num_labels:]
        grids = np.array(prompt.grids, dtype=np.int32).reshape(-1, 2)
        samples.append(
            EncodedSample(
                sample_id=f"prompt {number}",
                input_ids=ids,
                labels=labels,
                crops=prompt.crops.numpy(),
                crop_grid=grids,
            )
        )
    return collate(samples)


def gradients(model: Phi3VForCausalLM, row: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a row, and a gradient of every weight that has one."""
    model.zero_grad()
    loss = model.packed_loss(row)
    loss.backward()
    return loss.detach(), {
        name: weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }
