"""Pictures to the published image processor's float views.

    Phi3VImageProcessor(num_crops=4)(["a.jpg", "b.jpg"])

    pixel_values    float32 (2, 5, 3, 336, 336)   global view, local crops, zeros
    image_sizes     int64 (2, 2)                  (height, width) of the padded images
    num_img_tokens  int64 (2,)

For inference, and for code written for the published model. Training ships uint8 crops instead (see
`collator`); both end in the same pixels, by the same functions.
"""

from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict

import torch
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

# By its module: at the top transformers 5.17 offers it to those who have torchvision only.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from phi3v_train.configuration_phi3_v import Phi3VConfig
from phi3v_train.hd_transform import (
    CROP,
    IMAGE_MEAN,
    IMAGE_STD,
    hd_crops,
    hd_layout,
    num_image_tokens,
)
from phi3v_train.modeling_phi3_v import normalize_views
from phi3v_train.picture import Picture, read_picture


class _ImageSettings(TypedDict):
    """What `from_pretrained` takes for the image processor, besides what is in the file."""

    num_crops: NotRequired[int]


class Phi3VImageProcessor(BaseImageProcessor):
    """Pictures to the published float views.

    Args:
        num_crops: most local crops an image may have: 4 for many images, 16 for one.
        image_mean: of CLIP; nothing else fits the model.
        image_std: likewise.
        num_img_tokens: tokens of a crop, 144.
        do_convert_rgb: always done.
        kwargs: other fields of `preprocessor_config.json`; ignored.

    Raises:
        ValueError: settings that the model was not trained with.
    """

    model_input_names = ("pixel_values", "image_sizes")
    valid_kwargs = _ImageSettings

    def __init__(
        self,
        num_crops: int = 16,
        image_mean: Sequence[float] = IMAGE_MEAN,
        image_std: Sequence[float] = IMAGE_STD,
        num_img_tokens: int = 144,
        do_convert_rgb: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if num_crops < 1:
            raise ValueError(f"num_crops: expected at least 1, got {num_crops}")
        if (*image_mean, *image_std) != (*IMAGE_MEAN, *IMAGE_STD) or num_img_tokens != 144:
            raise ValueError(
                f"expected CLIP's image_mean {IMAGE_MEAN}, image_std {IMAGE_STD} and 144 tokens a "
                f"crop, got {tuple(image_mean)}, {tuple(image_std)} and {num_img_tokens}"
            )
        self.num_crops = num_crops

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """From the fields of `preprocessor_config.json`; `num_crops` may be given anew."""
        return_unused = kwargs.pop("return_unused_kwargs", False)
        fields = {**image_processor_dict}
        if kwargs.get("num_crops") is not None:
            fields["num_crops"] = kwargs.pop("num_crops")
        processor = cls(**fields)
        return (processor, kwargs) if return_unused else processor

    def to_dict(self) -> dict[str, Any]:
        """The fields of the published `preprocessor_config.json`."""
        return {
            "do_convert_rgb": True,
            "image_mean": list(IMAGE_MEAN),
            "image_processor_type": "Phi3VImageProcessor",
            "image_std": list(IMAGE_STD),
            "num_crops": self.num_crops,
            "num_img_tokens": 144,
            "processor_class": "Phi3VProcessor",
        }

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]: no options of other models
        self,
        images: Picture | list[Picture] | tuple[Picture, ...],
        *,
        return_tensors: Any = "pt",
        num_crops: int | None = None,
    ) -> BatchFeature:
        """Transform pictures.

        Args:
            images: one or several, see `picture.read_picture`.
            return_tensors: as in transformers.
            num_crops: instead of the processor's own.

        Returns:
            `pixel_values` float32 (I, num_crops + 1, 3, 336, 336), `image_sizes` int64 (I, 2) as
            (height, width), `num_img_tokens` int64 (I,).

        Raises:
            ValueError: a picture that cannot be read, or is too long and thin.
        """
        limit = self.num_crops if num_crops is None else num_crops
        pictures = images if isinstance(images, list | tuple) else (images,)
        read = [read_picture(picture) for picture in pictures]
        grids = [hd_layout(*picture.size, limit).grid for picture in read]
        pixels = torch.zeros(len(read), limit + 1, 3, CROP, CROP)
        for image, (picture, grid) in enumerate(zip(read, grids, strict=True)):
            views, local = normalize_views(torch.from_numpy(hd_crops(picture, limit)), [grid])
            pixels[image, 0] = views[0]
            pixels[image, 1 : 1 + len(local)] = local
        data = {
            "pixel_values": pixels,
            "image_sizes": torch.tensor(grids, dtype=torch.int64).reshape(-1, 2) * CROP,
            "num_img_tokens": torch.tensor([num_image_tokens(*grid) for grid in grids]),
        }
        return BatchFeature(
            data if return_tensors is not None else {k: v.tolist() for k, v in data.items()},
            tensor_type=return_tensors,
        )

    preprocess = __call__  # pyright: ignore[reportAssignmentType]: as above


AutoImageProcessor.register(
    Phi3VConfig, image_processor_classes={"pil": Phi3VImageProcessor}, exist_ok=True
)
