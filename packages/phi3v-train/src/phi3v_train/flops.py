"""Floating point operations of training: the numerator of every MFU.

    work = Work.of_row(batch)                    # tokens, squared lengths, crops, label tokens
    training_flops(config, method, work)         # 76.3e12 for a page of a document, full training
    mfu = flops / (seconds * num_devices * peak)

Of a matrix product of n x k by k x m, 2 n k m. Forward, per sample of T tokens of which I stand for
images, C crops (each image's global view is one) and L label tokens:

    llm         2 T x weights of the decoder layers   + 2 T^2 x width x layers (causal: half of 4)
                + 2 L x width x vocabulary            (logits are computed at labels only)
    vision      C x (2 x 577 x weights of the layers  + 4 x 577^2 x width x layers + patches)
    projector   2 I x its weights

A part whose weights train costs three times its forward pass; one that only hands gradients on
(adapters, or frozen with something trained in front) twice; one that does neither once. That
counts attention's backward pass under adapters as one forward pass where it is two, and leaves the
adapters' own products out: some 3 % too few each, on the careful side. What gradient checkpointing
computes a second time does not count: it is not progress.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from phi3v_train.config import MethodConfig, Part
from phi3v_train.configuration_phi3_v import Phi3VConfig
from phi3v_train.hd_transform import num_image_tokens

if TYPE_CHECKING:
    from phi3v_train.collator import Batch


@dataclass(frozen=True, slots=True)
class Work:
    """What was computed, in counts; sums over any samples."""

    num_tokens: int
    squared_lengths: int
    """Sum of the squares of the samples' token counts: no sample attends to another."""

    num_image_tokens: int
    """Tokens that stand for images."""

    num_crops: int
    """That the vision tower ran, global views included."""

    num_label_tokens: int

    @classmethod
    def of_row(cls, row: "Batch") -> "Work":
        """Of one packed row, from what the host knows of it."""
        bounds = row.cu_seqlens.tolist()
        lengths = [end - start for start, end in pairwise(bounds)]
        grids: list[tuple[int, int]] = [(rows, columns) for rows, columns in row.crop_grid.tolist()]
        return cls(
            num_tokens=sum(lengths),
            squared_lengths=sum(length * length for length in lengths),
            num_image_tokens=sum(num_image_tokens(*grid) for grid in grids),
            num_crops=sum(rows * columns + 1 for rows, columns in grids),
            num_label_tokens=row.num_label_tokens,
        )

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.num_tokens + other.num_tokens,
            self.squared_lengths + other.squared_lengths,
            self.num_image_tokens + other.num_image_tokens,
            self.num_crops + other.num_crops,
            self.num_label_tokens + other.num_label_tokens,
        )


NO_WORK = Work(0, 0, 0, 0, 0)


def forward_flops(config: Phi3VConfig, work: Work) -> dict[Part, float]:
    """Operations of one forward pass, by part of the model."""
    vision = config.vision_config
    assert vision is not None
    width, layers = config.hidden_size, config.num_hidden_layers
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    assert kv_heads is not None
    qkv = (heads + 2 * kv_heads) * config.head_dim
    layer_weights = width * (qkv + heads * config.head_dim + 3 * config.intermediate_size)

    clip_width = vision["hidden_size"]
    clip_layers = vision["num_hidden_layers"] - 1  # features come from before the last layer
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    positions = patches + 1
    clip_layer_weights = 4 * clip_width**2 + 2 * clip_width * vision["intermediate_size"]
    patch_weights = vision["num_channels"] * vision["patch_size"] ** 2 * clip_width
    per_crop = (
        2 * positions * clip_layer_weights * clip_layers
        + 4 * positions**2 * clip_width * clip_layers
        + 2 * patches * patch_weights
    )
    return {
        "vision": float(work.num_crops * per_crop),
        "projector": 2.0 * work.num_image_tokens * (4 * clip_width * width + width * width),
        "llm": 2.0 * work.num_tokens * layer_weights * layers
        + 2.0 * work.squared_lengths * heads * config.head_dim * layers
        + 2.0 * work.num_label_tokens * width * config.vocab_size,
    }


def training_flops(config: Phi3VConfig, method: MethodConfig, work: Work) -> float:
    """Operations of forward and backward pass together, nothing computed twice.

    Args:
        config: sizes of the model.
        method: what trains.
        work: of the samples.
    """
    total = 0.0
    hands_on_gradients = False
    for part, flops in forward_flops(config, work).items():  # as the data flows
        hands_on_gradients = hands_on_gradients or part in method.trained_parts
        total += flops * (1 + hands_on_gradients + (part in method.full_parts))
    return total
