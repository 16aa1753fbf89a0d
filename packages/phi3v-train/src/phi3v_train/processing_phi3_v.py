r"""Prompt and pictures to model inputs, as the published processor makes them.

    processor = Phi3VProcessor.from_pretrained(folder)
    inputs = processor("<|user|>\\n<|image_1|>\\nWhat is it?<|end|>\\n<|assistant|>\\n", [picture])
    model.generate(**inputs)

    input_ids     (1, T)                     image n stands as `-n`, repeated
    pixel_values  (I, num_crops + 1, 3, 336, 336)  global view, local crops, zeros
    image_sizes   (I, 2)                     (height, width) of the padded images

Departures from the published processor: image tags must be 1..n in order (it takes repeated and
exchanged ones, and the model then puts the wrong picture in the place), and pictures are turned
upright by their EXIF orientation, as in training.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from phi3v_data.images import upright_rgb
from PIL import Image
from torch import Tensor

from phi3v_train.chat import IMAGE_TAG, ChatEncoder
from phi3v_train.hd_transform import CROP, cut_crops, hd_image, num_image_tokens
from phi3v_train.modeling_phi3_v import normalize_views


class Phi3VProcessor:
    """The published processor's call, over our own image transform and tokenizer.

    Args:
        chat: the tokenizer.
        num_crops: most local crops an image may have.
    """

    def __init__(self, chat: ChatEncoder, num_crops: int) -> None:
        self.chat = chat
        self.num_crops = num_crops

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, num_crops: int | None = None
    ) -> "Phi3VProcessor":
        """Read `tokenizer.json` and `preprocessor_config.json` of a model folder."""
        if num_crops is None:
            settings = json.loads((Path(folder) / "preprocessor_config.json").read_text())
            num_crops = int(settings["num_crops"])
        return cls(ChatEncoder(folder), num_crops)

    def __call__(self, text: str, images: Sequence[Image.Image] = ()) -> dict[str, Tensor]:
        """Encode one prompt.

        Args:
            text: the prompt as the chat template renders it, with `<|image_1|>` ... `<|image_n|>`.
            images: n pictures, any mode.

        Returns:
            `input_ids` and `attention_mask` (1, T) int64; with images also `pixel_values` float32
            and `image_sizes` int64; see the module docstring.

        Raises:
            ValueError: tags that are not 1..n in order, or not as many as images.
        """
        tags = [int(number) for number in IMAGE_TAG.findall(text)]
        if tags != list(range(1, len(images) + 1)):
            raise ValueError(
                f"expected the image tags 1 to {len(images)}, once each and in order, for "
                f"{len(images)} images, got {tags}"
            )
        canvases = [hd_image(upright_rgb(image), self.num_crops) for image in images]
        grids = [(canvas.shape[0] // CROP, canvas.shape[1] // CROP) for canvas in canvases]
        ids: list[int] = []
        for number, piece in enumerate(IMAGE_TAG.split(text)[::2]):
            if number:
                ids += [-number] * num_image_tokens(*grids[number - 1])
            ids += self.chat.tokenizer.encode(piece).ids
        input_ids = torch.tensor([ids])
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        if canvases:
            crops = [cut_crops(canvas) for canvas in canvases]
            views, local = normalize_views(torch.from_numpy(np.concatenate(crops)), grids)
            pixels = torch.zeros(len(crops), self.num_crops + 1, 3, CROP, CROP)
            pixels[:, 0] = views
            for image, own in enumerate(local.split([len(c) for c in crops])):
                pixels[image, 1 : 1 + len(own)] = own
            inputs["pixel_values"] = pixels
            inputs["image_sizes"] = torch.tensor(grids) * CROP
        return inputs
