"""Encoding an image for training: the published processor's steps against ours, on one core.

    uv run python benchmarks/encode.py --json encode.json

Both sides start from the same JPEG bytes in the same process, in turns, torch with one thread.

    published   decode, RGB, turn a portrait, resize, pad with white, turn back, to float32 [0, 1],
                normalise, bicubic global view, cut, zeros up to num_crops + 1 views
    exact       what a worker does here: decode, resize, pad, cut, all uint8; the rest of the above
                is done by the model on its device, and is not in the time
    fast        the same with `data.resize=fast`

The published steps are restated here from their documented behaviour: Pillow for the picture,
torch for the floats, as torchvision's transforms do it. Before anything is timed, the pixel values
that the model sees are compared: 2e-6 at most between published and exact.

What is printed is how many times less time ours takes: the median over the rounds of (published /
ours), and the least and largest of them. `cpu` is the time the process ran, `wall` the time that
passed: on a machine that others use too, believe `cpu`.
"""

import io
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import PIL
import torch
from phi3v_data.images import decode_image
from phi3v_train.hd_transform import CROP, IMAGE_MEAN, IMAGE_STD, hd_crops, hd_layout
from phi3v_train.modeling_phi3_v import normalize_views
from PIL import Image, ImageDraw, ImageFont, ImageOps, features
from ratios import Ratio, ratio
from results import json_option, show_results
from torch import Tensor

TOLERANCE = 2e-6
"""Largest difference of a pixel value, in standard deviations, between published and exact."""

REPEATS = 3
"""Calls behind one measured time."""


@dataclass(frozen=True)
class Case:
    """A picture and a crop count."""

    name: str
    picture: Callable[[], Image.Image]
    num_crops: int
    target: float
    """The claim: published / exact, decoding included."""


@dataclass(frozen=True)
class Result:
    """One case, measured."""

    case: str
    size_wh: tuple[int, int]
    num_crops: int
    jpeg_bytes: int
    target: float
    ratios: Mapping[str, Mapping[str, Mapping[str, Ratio]]]
    """`jpeg` or `picture` (what is started from) -> `exact` or `fast` -> `cpu` or `wall`."""
    published_bytes: int
    """What a worker hands to the training process."""
    our_bytes: int
    largest_difference: float
    """Of a pixel value as the model sees it, between published and exact."""
    fast_max_steps: int
    """Of 255, between fast and exact."""
    fast_mean_steps: float


# --- pictures -------------------------------------------------------------------------------------


def make_photo(width: int = 640, height: int = 480) -> Image.Image:
    """Soft shapes of many sizes with grain: as hard to compress as a photo."""
    random = np.random.default_rng(0)
    pixels = np.full((height, width, 3), 128, dtype=np.float32)
    for cells, contrast in ((6, 60), (24, 40), (96, 20), (300, 8)):
        for band in range(3):
            coarse = random.normal(0, contrast, (cells * height // width, cells))
            shapes = Image.fromarray(coarse.astype(np.float32))
            pixels[..., band] += np.asarray(
                shapes.resize((width, height), Image.Resampling.BICUBIC)
            )
    pixels += random.normal(0, 2, (height, width, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_page(width: int = 1700, height: int = 2200) -> Image.Image:
    """A letter page at 200 dpi: lines of words in black on paper with a scanner's noise."""
    random = np.random.default_rng(0)
    page = Image.new("RGB", (width, height), (250, 250, 246))
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(28)
    for y in range(height // 12, height - height // 12, 44):
        words = ("".join(map(chr, random.integers(97, 123, n))) for n in random.integers(2, 10, 14))
        draw.text((width // 12, y), " ".join(words), fill=(20, 20, 24), font=font)
    pixels = np.asarray(page) + random.normal(0, 1.5, (height, width, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


CASES = (
    Case("photo 640x480, 4 crops", make_photo, 4, target=2.5),
    Case("photo 640x480, 16 crops", make_photo, 16, target=3.5),
    Case("page 1700x2200, 16 crops", make_page, 16, target=1.8),
)


def to_jpeg(picture: Image.Image) -> bytes:
    """Quality 90, chroma halved in both directions: a camera's and a scanner's habit."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()


# --- the two sides --------------------------------------------------------------------------------


def published_views(picture: Image.Image, num_crops: int) -> Tensor:
    """The published processor's pixel values of one image: float32 (num_crops + 1, 3, 336, 336)."""
    picture = picture.convert("RGB")
    is_portrait = picture.width < picture.height
    if is_portrait:
        picture = picture.transpose(Image.Transpose.TRANSPOSE)
    layout = hd_layout(picture.width, picture.height, num_crops)
    (height, width), top = layout.resized_hw, layout.top_left[0]
    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    bottom = layout.canvas_hw[0] - height - top
    picture = ImageOps.expand(picture, (0, top, 0, bottom), fill=(255, 255, 255))
    if is_portrait:
        picture = picture.transpose(Image.Transpose.TRANSPOSE)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
    floats = pixels.to(torch.float32).div(255)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
    floats = floats.clone().sub_(mean).div_(std)
    whole = torch.nn.functional.interpolate(floats[None], (CROP, CROP), mode="bicubic")
    rows, columns = floats.shape[1] // CROP, floats.shape[2] // CROP
    tiles = floats.reshape(3, rows, CROP, columns, CROP).permute(1, 3, 0, 2, 4)
    views = torch.cat([whole, tiles.reshape(rows * columns, 3, CROP, CROP)])
    missing = num_crops + 1 - len(views)
    if missing:
        views = torch.cat([views, torch.zeros(missing, 3, CROP, CROP)])
    return torch.stack([views])[0]  # the published batch of one is a copy too


Side = Callable[[], object]


def sides(data: bytes, num_crops: int) -> dict[str, dict[str, Side]]:
    """What is timed: `jpeg` or `picture` (what is started from) -> name -> a call."""
    picture = decode_image(data)
    return {
        "jpeg": {
            "published": lambda: published_views(Image.open(io.BytesIO(data)), num_crops),
            "exact": lambda: hd_crops(decode_image(data), num_crops),
            "fast": lambda: hd_crops(decode_image(data), num_crops, "fast"),
        },
        "picture": {
            "published": lambda: published_views(picture, num_crops),
            "exact": lambda: hd_crops(picture, num_crops),
            "fast": lambda: hd_crops(picture, num_crops, "fast"),
        },
    }


# --- measuring ------------------------------------------------------------------------------------


def time_in_turns(calls: Mapping[str, Side], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by call and clock (`cpu`, `wall`), one value a round; every other round backwards."""
    seconds = {name: {"cpu": [], "wall": []} for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(REPEATS):
                calls[name]()
            seconds[name]["cpu"].append(time.process_time() - cpu)
            seconds[name]["wall"].append(time.perf_counter() - wall)
    return seconds


def measure(case: Case, rounds: int) -> Result:
    """Check that both sides agree, then time them.

    Raises:
        ValueError: they don't agree.
    """
    data = to_jpeg(case.picture())
    picture = decode_image(data)
    exact = hd_crops(picture, case.num_crops)
    steps = np.abs(hd_crops(picture, case.num_crops, "fast").astype(np.int16) - exact)
    published = published_views(Image.open(io.BytesIO(data)), case.num_crops)
    grid = hd_layout(*picture.size, case.num_crops).grid
    global_views, local = normalize_views(torch.from_numpy(exact), [grid])
    ours = torch.cat([global_views, local])
    difference = float((published[: len(ours)] - ours).abs().max())
    if difference > TOLERANCE:
        raise ValueError(f"{case.name}: pixel values differ by {difference:.1e}, not comparable")

    ratios: dict[str, dict[str, dict[str, Ratio]]] = {}
    for start, calls in sides(data, case.num_crops).items():
        seconds = time_in_turns(calls, rounds)
        ratios[start] = {
            name: {
                clock: ratio(seconds["published"][clock], seconds[name][clock])
                for clock in ("cpu", "wall")
            }
            for name in ("exact", "fast")
        }
    return Result(
        case=case.name,
        size_wh=picture.size,
        num_crops=case.num_crops,
        jpeg_bytes=len(data),
        target=case.target,
        ratios=ratios,
        published_bytes=published.nbytes,
        our_bytes=exact.nbytes,
        largest_difference=difference,
        fast_max_steps=int(steps.max()),
        fast_mean_steps=float(steps.mean()),
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch with one thread, as in a worker."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- results --------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Versions and processors that the ratios depend on."""
    return {
        "python": platform.python_version(),
        "pillow": PIL.__version__,
        "libjpeg_turbo": features.version("libjpeg_turbo"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_cpus": os.cpu_count(),
    }


def table(results: Sequence[Result]) -> Iterator[str]:
    """The lines of the tables."""
    yield f"{'published / ours':26}{'from':9}{'clock':7}{'exact':20}{'fast':20}target (exact)"
    for result in results:
        for start, ours in result.ratios.items():
            for clock in ("cpu", "wall"):
                target = f">= {result.target}" if start == "jpeg" else ""
                exact, fast = str(ours["exact"][clock]), str(ours["fast"][clock])
                line = f"{result.case:26}{start:9}{clock:7}{exact:20}{fast:20}{target}"
                yield line.rstrip()
    yield ""
    yield f"{'bytes handed over':26}{'published':>12}{'ours':>12}{'ratio':>8}   target >= 4"
    for result in results:
        times = result.published_bytes / result.our_bytes
        yield f"{result.case:26}{result.published_bytes:12,}{result.our_bytes:12,}{times:8.2f}"
    yield ""
    yield f"{'differences':26}exact, pixel values    fast, steps of 255: max, mean"
    for result in results:
        yield (
            f"{result.case:26}{result.largest_difference:<23.1e}"
            f"{result.fast_max_steps}, {result.fast_mean_steps:.3f}"
        )


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=41, help="Times every side is measured.")
@click.option("--cases", type=click.IntRange(1), default=len(CASES), help="Only the first so many.")
@json_option
def main(rounds: int, cases: int, json_file: Path | None) -> None:
    """Encoding an image for training: the published processor's steps against ours."""
    about = machine() | {"rounds": rounds}
    try:
        with one_thread():
            results = [measure(case, rounds) for case in CASES[:cases]]
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    show_results(about, table(results), results, json_file)


if __name__ == "__main__":
    main()
