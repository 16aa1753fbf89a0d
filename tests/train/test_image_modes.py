"""What the validator lets through, training and inference see alike, and as it is.

A picture of 672 x 336 pixels fills two crops without resizing or padding: put together again, the
crops are the very pixels that were decoded.
"""

import itertools
import json
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from phi3v_data import validate, write_samples
from phi3v_data.image_check import ImageCheck
from phi3v_data.images import ORIENTATION_TAG, ImageInfo, probe_image
from phi3v_data.rules import Context
from phi3v_data.rules.images import extreme_aspect_ratio
from phi3v_train.chat import ChatEncoder
from phi3v_train.collator import EncodedSample, SampleEncoder
from phi3v_train.hd_transform import CROP, hd_layout
from phi3v_train.modeling_phi3_v import normalize_views
from phi3v_train.processing_phi3_v import Phi3VProcessor
from PIL import Image, ImageOps
from torch import Tensor

from tests.train.builders import make_sample

ODD = Path(__file__).resolve().parents[3] / "shared" / "testdata" / "images_odd"
ODD_FILES = [p.relative_to(ODD).as_posix() for p in sorted(ODD.glob("*/*"))]

PROMPT = "<|user|>\n<|image_1|>\nWhat is it?<|end|>\n<|assistant|>\n"
NUM_CROPS = 2
WIDTH, HEIGHT = 2 * CROP, CROP

# --- pictures -------------------------------------------------------------------------------------

_Y, _X = np.mgrid[:HEIGHT, :WIDTH]
_RANDOM = np.random.default_rng(0)

# Slow changes, which lossy formats keep, and different from each of its turned and mirrored selves.
COLOUR = np.stack([_Y * 255 // HEIGHT, _X * 255 // WIDTH, 255 - (_X + _Y) // 4], -1).astype("u1")
GREY = COLOUR[..., 0]
INKS = np.concatenate([COLOUR, (_X // 4)[..., None].astype("u1")], -1)
UNDER_INK = (255.0 - INKS[..., :3]) * (255.0 - INKS[..., 3:]) / 255

ALPHA = _RANDOM.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
BITS = _RANDOM.random((HEIGHT, WIDTH)) < 0.5
SIXTEEN = _RANDOM.integers(0, 1 << 16, (HEIGHT, WIDTH, 3), dtype=np.uint16)
PALETTE = _RANDOM.integers(0, 256, (256, 3), dtype=np.uint8)
INDICES = ((_X + 3 * _Y) % 256).astype("u1")


def grey(values: NDArray[np.generic]) -> NDArray[np.generic]:
    return np.repeat(values[..., None], 3, -1)


@dataclass(frozen=True)
class Kind:
    """A kind of file, and what is in it."""

    name: str
    mode: str
    """As stored."""

    write: Callable[[Path], object]
    seen: NDArray[np.generic]
    """The picture, (336, 672, 3), 0 to 255."""

    most_off: float = 0
    """How many steps a pixel may be off, where storing it loses something."""


def saved(image: Image.Image, **options: Any) -> Callable[[Path], object]:
    return lambda path: image.save(path, **options)


def with_alpha(colour: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(np.dstack([colour, ALPHA]))


def with_palette(palette: NDArray[np.uint8] = PALETTE) -> Image.Image:
    image = Image.fromarray(INDICES)
    image.putpalette(palette.tobytes())
    return image


def png_of_16_bits(colour_type: int, *planes: NDArray[np.uint16]) -> Callable[[Path], object]:
    """Pillow writes 16 bits of grey only."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc

    pixels = np.dstack(planes).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, colour_type, 0, 0, 0)
    content = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows, 1))
        + chunk(b"IEND", b"")
    )
    return lambda path: path.write_bytes(content)


RGB = Image.fromarray(COLOUR)
CMYK = Image.fromarray(INKS, "CMYK")
FINE: dict[str, Any] = {"quality": 95, "subsampling": 0}
TWO: dict[str, Any] = {"save_all": True, "append_images": [Image.fromarray(255 - COLOUR)]}

KINDS = [
    Kind("rgb.png", "RGB", saved(RGB), COLOUR),
    Kind("rgb.bmp", "RGB", saved(RGB), COLOUR),
    Kind("rgb.tif", "RGB", saved(RGB, compression="tiff_lzw"), COLOUR),
    Kind("rgb.ppm", "RGB", saved(RGB), COLOUR),
    Kind("rgb-colour-key.png", "RGB", saved(RGB, transparency=(0, 0, 255)), COLOUR),
    Kind("rgb-16.png", "RGB", png_of_16_bits(2, SIXTEEN), SIXTEEN >> 8),
    Kind("rgba-16.png", "RGBA", png_of_16_bits(6, SIXTEEN, SIXTEEN[..., 0]), SIXTEEN >> 8),
    Kind("rgba.png", "RGBA", saved(with_alpha(COLOUR)), COLOUR),
    Kind("rgba.tif", "RGBA", saved(with_alpha(COLOUR)), COLOUR),
    Kind("l.png", "L", saved(Image.fromarray(GREY)), grey(GREY)),
    Kind("l-grey-key.png", "L", saved(Image.fromarray(GREY), transparency=7), grey(GREY)),
    Kind("la.png", "LA", saved(Image.fromarray(np.dstack([GREY, ALPHA]), "LA")), grey(GREY)),
    Kind("p.png", "P", saved(with_palette()), PALETTE[INDICES]),
    Kind("p-one-clear.png", "P", saved(with_palette(), transparency=7), PALETTE[INDICES]),
    Kind(
        "p-alphas.png",
        "P",
        saved(with_palette(), transparency=bytes(range(256))),
        PALETTE[INDICES],
    ),
    Kind("p.gif", "P", saved(with_palette()), PALETTE[INDICES]),
    Kind("p-one-clear.gif", "P", saved(with_palette(), transparency=7), PALETTE[INDICES]),
    Kind("16.png", "I;16", saved(Image.fromarray(SIXTEEN[..., 0])), grey(SIXTEEN[..., 0] >> 8)),
    Kind("16.tif", "I;16", saved(Image.fromarray(SIXTEEN[..., 0])), grey(SIXTEEN[..., 0] >> 8)),
    Kind(
        "16-big-endian.tif",
        "I;16B",
        saved(Image.fromarray(SIXTEEN[..., 0].astype(">u2"))),
        grey(SIXTEEN[..., 0] >> 8),
    ),
    Kind("16.pgm", "I", saved(Image.fromarray(SIXTEEN[..., 0])), grey(SIXTEEN[..., 0] >> 8)),
    Kind(
        "la-16.png",
        "RGBA",  # which is how Pillow reads it
        png_of_16_bits(4, SIXTEEN[..., 0], SIXTEEN[..., 1]),
        grey(SIXTEEN[..., 0] >> 8),
    ),
    Kind("1.png", "1", saved(Image.fromarray(BITS)), grey(255 * BITS)),
    Kind("1-fax.tif", "1", saved(Image.fromarray(BITS), compression="group4"), grey(255 * BITS)),
    Kind("1.pbm", "1", saved(Image.fromarray(BITS)), grey(255 * BITS)),
    Kind("1.bmp", "1", saved(Image.fromarray(BITS)), grey(255 * BITS)),
    Kind("cmyk.tif", "CMYK", saved(CMYK), UNDER_INK, 1),
    Kind("ycbcr.tif", "YCbCr", saved(RGB.convert("YCbCr")), COLOUR, 3),
    # Pillow stores the inks of a JPEG inverted, with Adobe's mark, as Photoshop does.
    Kind("cmyk.jpg", "CMYK", saved(CMYK, **FINE), UNDER_INK, 4),
    Kind("ycbcr.jpg", "RGB", saved(RGB.convert("YCbCr"), **FINE), COLOUR, 6),
    Kind("not-ycbcr.jpg", "RGB", saved(RGB, **FINE, keep_rgb=True), COLOUR, 3),
    Kind("chroma-halved.jpg", "RGB", saved(RGB, quality=95), COLOUR, 6),
    Kind("l.jpg", "L", saved(Image.fromarray(GREY), **FINE), grey(GREY), 3),
    Kind("progressive.jpg", "RGB", saved(RGB, **FINE, progressive=True), COLOUR, 6),
    Kind("lossless.webp", "RGB", saved(RGB, lossless=True), COLOUR),
    Kind("lossy.webp", "RGB", saved(RGB, quality=95), COLOUR, 10),
    Kind(
        "lossless-alpha.webp", "RGBA", saved(with_alpha(COLOUR), lossless=True, exact=True), COLOUR
    ),
    Kind("lossy-alpha.webp", "RGBA", saved(with_alpha(COLOUR), quality=95, exact=True), COLOUR, 10),
    Kind(
        "animated.gif",
        "P",
        saved(with_palette(), save_all=True, append_images=[with_palette(255 - PALETTE)]),
        PALETTE[INDICES],
    ),
    Kind("animated.webp", "RGB", saved(RGB, lossless=True, **TWO), COLOUR),
    Kind("animated.png", "RGB", saved(RGB, **TWO), COLOUR),
    Kind("pages.tif", "RGB", saved(RGB, **TWO), COLOUR),
    Kind("two.mpo", "RGB", saved(RGB, **FINE, **TWO), COLOUR, 6),
]


def stored(orientation: int) -> Image.Image:
    """The picture as a camera held in that way stores it."""
    turns = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"}
    turns |= {6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}
    if orientation == 1:
        return RGB
    return RGB.transpose(Image.Transpose[turns[orientation]])


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION_TAG] = orientation
    return tags


def turned(name: str, orientation: int, most_off: float = 0, **options: Any) -> Kind:
    write = saved(stored(orientation), exif=exif(orientation), **options)
    return Kind(f"orientation-{orientation}{name}", "RGB", write, COLOUR, most_off)


TURNED = [
    *(turned(".jpg", orientation, 6, **FINE) for orientation in range(1, 9)),
    turned(".png", 6),
    turned(".tif", 6),
    turned(".tif", 7),
    turned(".webp", 8, lossless=True),
]

# --- both ways ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of `NUM_CROPS` crops an image."""
    folder = tmp_path_factory.mktemp("modes") / "model"
    shutil.copytree(tiny, folder)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_crops": NUM_CROPS}))
    return folder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> SampleEncoder:
    return SampleEncoder(ChatEncoder(folder), NUM_CROPS)


@pytest.fixture(scope="module")
def processor(folder: Path) -> Phi3VProcessor:
    return Phi3VProcessor.from_pretrained(folder)


def codes(folder: Path, root: Path, name: str) -> list[str]:
    """The validator's errors in a sample with that image; its file is written into `folder`."""
    file = folder / "validated.jsonl"
    write_samples(file, [make_sample("s", ((name,), "What is it?", "It."))])
    report = validate([file], images=root, num_crops=NUM_CROPS, num_workers=1)
    return [found.code for found in report.diagnostics if found.severity == "error"]


def trained_on(encoder: SampleEncoder, root: Path, name: str) -> EncodedSample:
    sample = make_sample("s", ((name,), "What is it?", "It."))
    return encoder(sample, [(root / name).read_bytes()])


def views(encoded: EncodedSample) -> Tensor:
    """What the model makes of an encoded image: global view, crops, zeros, as the processor's."""
    grid = [(int(rows), int(columns)) for rows, columns in encoded.crop_grid]
    whole, crops = normalize_views(torch.from_numpy(encoded.crops), grid)
    rest = torch.zeros(NUM_CROPS - len(crops), 3, CROP, CROP)
    return torch.cat([whole, crops, rest])


def picture(encoded: EncodedSample) -> NDArray[np.uint8]:
    """The crops of an image, put together."""
    rows, columns = encoded.crop_grid[0]
    tiles = encoded.crops.reshape(rows, columns, 3, CROP, CROP)
    return tiles.transpose(0, 3, 1, 4, 2).reshape(rows * CROP, columns * CROP, 3)


def check_both_see(
    image: Image.Image, encoded: EncodedSample, processor: Phi3VProcessor, name: str
) -> None:
    """That inference on `image` gives the model the very numbers of training."""
    inputs = processor(PROMPT, [image])
    assert torch.equal(torch.as_tensor(inputs["pixel_values"])[0], views(encoded)), name
    sizes = torch.as_tensor(inputs["image_sizes"]).tolist()
    assert sizes == (encoded.crop_grid * CROP).tolist(), name


@pytest.mark.parametrize("kind", [*KINDS, *TURNED], ids=lambda kind: kind.name)
def test_a_picture_is_seen_as_it_is_in_training_and_in_inference(
    kind: Kind, tmp_path: Path, encoder: SampleEncoder, processor: Phi3VProcessor
) -> None:
    kind.write(tmp_path / kind.name)
    assert probe_image(tmp_path / kind.name).mode == kind.mode
    assert codes(tmp_path, tmp_path, kind.name) == []

    encoded = trained_on(encoder, tmp_path, kind.name)

    seen = picture(encoded)
    assert seen.shape == kind.seen.shape
    assert np.abs(seen - kind.seen.astype(float)).max() <= kind.most_off
    with Image.open(tmp_path / kind.name) as image:
        check_both_see(image, encoded, processor, kind.name)


@pytest.mark.parametrize("kind", TURNED, ids=lambda kind: kind.name)
def test_a_picture_is_turned_once_whatever_the_caller_did_to_it(
    kind: Kind, tmp_path: Path, encoder: SampleEncoder, processor: Phi3VProcessor
) -> None:
    kind.write(tmp_path / kind.name)
    encoded = trained_on(encoder, tmp_path, kind.name)
    for prepare in (
        lambda image: image.convert("RGB"),
        lambda image: image.copy(),
        ImageOps.exif_transpose,
    ):
        with Image.open(tmp_path / kind.name) as image:
            check_both_see(prepare(image), encoded, processor, kind.name)


@pytest.mark.parametrize(
    ("name", "write", "code"),
    [
        ("float.tif", saved(Image.new("F", (9, 9))), "I102"),
        ("int.tif", saved(Image.new("I", (9, 9))), "I102"),
        ("thin.png", saved(Image.new("L", (NUM_CROPS * CROP + 1, 1))), "I105"),
        ("tall.png", saved(Image.new("L", (1, NUM_CROPS * CROP + 1))), "I105"),
    ],
)
def test_what_the_validator_reports_is_one_value_error_in_training_and_in_inference(
    name: str,
    write: Callable[[Path], object],
    code: str,
    tmp_path: Path,
    encoder: SampleEncoder,
    processor: Phi3VProcessor,
) -> None:
    write(tmp_path / name)
    assert codes(tmp_path, tmp_path, name) == [code]
    reason = {"I102": "no defined white level", "I105": "too long and thin"}[code]

    with pytest.raises(ValueError, match=rf"^sample 's', image '{name}': .*{reason}"):
        trained_on(encoder, tmp_path, name)
    with Image.open(tmp_path / name) as image, pytest.raises(ValueError, match=reason):
        processor(PROMPT, [image])


@pytest.mark.skipif(not ODD_FILES, reason="the shared odd images are not here")
@pytest.mark.parametrize("name", ODD_FILES)
def test_the_validators_verdict_on_an_odd_image_holds_in_training_and_in_inference(
    name: str, encoder: SampleEncoder, processor: Phi3VProcessor, tmp_path: Path
) -> None:
    errors = set(codes(tmp_path, ODD, name)) - {"I104"}
    if not errors:
        with Image.open(ODD / name) as image:
            check_both_see(image, trained_on(encoder, ODD, name), processor, name)
        return
    assert errors in ({"I102"}, {"I107"})
    with pytest.raises(ValueError, match=rf"^sample 's', image '{name}': .+") as caught:
        trained_on(encoder, ODD, name)
    assert "\n" not in str(caught.value)
    try:
        image = Image.open(ODD / name)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return  # the caller's own call fails, before ours
    with image, pytest.raises(ValueError, match=r".+"):
        processor(PROMPT, [image])


# --- sizes ----------------------------------------------------------------------------------------


def reported(width: int, height: int, num_crops: int) -> bool:
    """Whether the rule about long and thin images reports this one."""
    info = ImageInfo(width, height, "RGB", "PNG", 1)
    context = Context(
        file="x.jsonl",
        line_number=1,
        image_root="images",
        images={"a.png": ImageCheck("ok", info=info)},
        ids={},
        allow_missing_answer=False,
        num_crops=num_crops,
    )
    return any(extreme_aspect_ratio(make_sample("s", (("a.png",), "u", "a")), context))


def refused(width: int, height: int, num_crops: int) -> bool:
    """Whether training refuses it."""
    try:
        hd_layout(width, height, num_crops)
    except ValueError:
        return True
    return False


def test_the_validator_reports_the_sizes_that_training_refuses() -> None:
    shorts = [1, 2, 3, 7, 10, 19, 100, 333, 1999]
    num_refused = 0
    for num_crops, short in itertools.product([*range(1, 18), 33, 64], shorts):
        limit = CROP * num_crops * short
        for long in (short, limit // 2, *range(limit - 3, limit + 4), 2 * limit):
            for width, height in ((long, short), (short, long)):
                expected = refused(width, height, num_crops)
                assert reported(width, height, num_crops) == expected, (width, height, num_crops)
                num_refused += expected
    assert num_refused == 19 * len(shorts) * 4 * 2


@given(st.integers(1, 10**9), st.integers(1, 10**5), st.integers(1, 100))
@example(178_956_970, 1, 16)
def test_the_validator_and_training_agree_on_any_size(
    width: int, height: int, num_crops: int
) -> None:
    assert reported(width, height, num_crops) == refused(width, height, num_crops)
