"""Checking the images of a data set, by level, on one core: Pillow against `check_image`.

    uv run python benchmarks/validate_images.py --json validate_images.json

    header   PIL.Image.open(path), which reads no pixels, against check_image(..., "header"), which
             also says orientation and depth, and that the path stays under the image root
    deep     PIL.Image.open(path).load(), a full decode, against check_image(..., "deep"), which
             also hashes the file
    cached   a deep run with an empty cache, which fills it, against the next one, which reads it;
             opening and closing the cache included

The files of a case are few, but have 1,920 names (hard links).

Both sides read the same files from the page cache, in turns, every other round backwards. What is
printed is how many times less time ours takes: the median over the rounds of (Pillow / ours), for
`cached` of (first / second run), and the least and largest of them. `cpu` is the time the process
ran, `wall` the time that passed: on a machine that others use too, believe `cpu`.

Before anything is timed both sides must agree: every file is whole, and of the size it was made in;
each, cut at nine tenths, is refused by both.
"""

import os
import platform
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import PIL
from phi3v_data import check_cache
from phi3v_data.image_check import Level, check_bytes, check_image
from PIL import Image, ImageDraw, ImageFont, features
from ratios import Ratio, ratio
from results import json_option, show_results

TARGETS = {
    ("header", "JPEG"): 2.5,
    ("header", "PNG"): 2.5,
    ("deep", "JPEG"): 2.0,
    ("deep", "PNG"): 20.0,
    ("cached", "JPEG"): 20.0,
    ("cached", "PNG"): 20.0,
}
"""(what, format) -> at least so many times less time; progressive JPEGs have none when deep."""


@dataclass(frozen=True)
class Case:
    """Files of one kind."""

    name: str
    picture: Callable[[int], Image.Image]
    format: str
    options: Mapping[str, Any]
    num_files: int
    has_deep_target: bool = True


@dataclass(frozen=True)
class Result:
    """One case, measured."""

    case: str
    num_files: int
    bytes_per_file: int
    targets: Mapping[str, float | None]
    ratios: Mapping[str, Mapping[str, Ratio]]
    """`header`, `deep` or `cached` -> `cpu` or `wall`."""
    our_us_per_file: Mapping[str, float]
    """Median CPU time of a call of ours, microseconds."""


# --- pictures -------------------------------------------------------------------------------------


def make_photo(seed: int, width: int = 640, height: int = 480) -> Image.Image:
    """Soft shapes of many sizes with grain: as hard to compress as a photo."""
    random = np.random.default_rng(seed)
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


def make_frame(seed: int) -> Image.Image:
    """As of a video of UCF-101."""
    return make_photo(seed, 320, 240)


def make_page(seed: int, width: int = 1240, height: int = 1754) -> Image.Image:
    """A page of A4 at 150 dpi: lines of words in black on paper with a scanner's noise."""
    random = np.random.default_rng(seed)
    page = Image.new("RGB", (width, height), (250, 250, 246))
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(20)
    for y in range(height // 12, height - height // 12, 32):
        words = ("".join(map(chr, random.integers(97, 123, n))) for n in random.integers(2, 10, 14))
        draw.text((width // 12, y), " ".join(words), fill=(20, 20, 24), font=font)
    pixels = np.asarray(page) + random.normal(0, 1.5, (height, width, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_screenshot(seed: int) -> Image.Image:
    """Flat areas and text, without noise."""
    random = np.random.default_rng(seed)
    screen = Image.new("RGB", (1280, 720), (255, 255, 255))
    draw = ImageDraw.Draw(screen)
    for _ in range(40):
        x, y, w, h = (int(value) for value in random.integers(0, 600, 4))
        draw.rectangle((x * 2, y, x * 2 + w, y + h), fill=tuple(random.integers(0, 255, 3)))
        draw.text((x * 2 + 4, y + 4), f"Window {w} of {h}", fill=(0, 0, 0))
    return screen


CASES = (
    Case("JPEG photo 640x480", make_photo, "JPEG", {"quality": 90}, 24),
    Case("JPEG frame 320x240", make_frame, "JPEG", {"quality": 90}, 48),
    Case("JPEG page 1240x1754", make_page, "JPEG", {"quality": 85}, 6),
    Case(
        "JPEG photo, progressive",
        make_photo,
        "JPEG",
        {"quality": 90, "progressive": True},
        24,
        has_deep_target=False,
    ),
    Case("PNG photo 640x480", make_photo, "PNG", {}, 16),
    Case("PNG page 1240x1754", make_page, "PNG", {}, 4),
    Case("PNG screenshot 1280x720", make_screenshot, "PNG", {}, 16),
)


def write_files(case: Case, root: Path) -> list[str]:
    """Write the files of a case; their names."""
    names: list[str] = []
    for number in range(case.num_files):
        names.append(f"{number:04}.{'jpg' if case.format == 'JPEG' else 'png'}")
        case.picture(number).save(root / names[-1], case.format, **case.options)
    return names


# --- the two sides --------------------------------------------------------------------------------

Side = Callable[[], object]

NUM_LINKS = 1920
"""Names that the files of a case are given."""


def sides(root: Path, names: Sequence[str], links: Sequence[str]) -> dict[str, Side]:
    """What is timed: name -> a call for all files.

    What takes microseconds is timed over all links, what takes milliseconds over the files.
    """
    paths = [os.fspath(root / name) for name in names]
    link_paths = [os.fspath(root / name) for name in links]
    cache_file = root / "cache" / "images.sqlite3"

    def open_all() -> None:
        for path in link_paths:
            with Image.open(path):
                pass

    def load_all() -> None:
        for path in paths:
            with Image.open(path) as image:
                image.load()

    def check_all(names: Sequence[str], level: Level) -> None:
        for name in names:
            check_image(root, name, level)

    def first_run() -> None:
        cache_file.unlink(missing_ok=True)
        with check_cache.open_cache("deep", cache_file) as cache:
            for name in links:
                check_image(root, name, "deep", cache)
            assert cache.num_hits == 0

    def second_run() -> None:
        with check_cache.open_cache("deep", cache_file) as cache:
            for name in links:
                check_image(root, name, "deep", cache)
            assert cache.num_hits == len(links)

    return {
        "open": open_all,
        "header": lambda: check_all(links, "header"),
        "load": load_all,
        "deep": lambda: check_all(names, "deep"),
        "first": first_run,
        "cached": second_run,
    }


AGAINST = {"header": "open", "deep": "load", "cached": "first"}


def agree(root: Path, names: Sequence[str]) -> None:
    """Check that both sides say the same.

    Raises:
        ValueError: they don't.
    """
    for name in names:
        data = (root / name).read_bytes()
        with Image.open(root / name) as image:
            for level in ("header", "deep", "full"):
                check = check_image(root, name, level)
                size = check.info and (check.info.width, check.info.height)
                if check.kind != "ok" or size != image.size:
                    raise ValueError(f"{name}, {level}: expected {image.size}, got {check}")
        if check_bytes(data[: len(data) * 9 // 10]).cause != "truncated":
            raise ValueError(f"{name}: a truncated copy passed")


# --- measuring ------------------------------------------------------------------------------------


def time_in_turns(calls: Mapping[str, Side], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by call and clock (`cpu`, `wall`), one value a round.

    Every other round goes backwards; `cached` always comes after `first`, which fills its cache.
    """
    seconds = {name: {"cpu": [], "wall": []} for name in calls}
    for number in range(rounds):
        names = [name for name in calls if name != "cached"][:: -1 if number % 2 else 1]
        names.insert(names.index("first") + 1, "cached")
        for name in names:
            cpu, wall = time.process_time(), time.perf_counter()
            calls[name]()
            seconds[name]["cpu"].append(time.process_time() - cpu)
            seconds[name]["wall"].append(time.perf_counter() - wall)
    return seconds


def measure(case: Case, rounds: int) -> Result:
    """Write the files, check that both sides agree, then time them.

    Raises:
        ValueError: they don't agree.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        names = write_files(case, root)
        agree(root, names)
        (root / "links").mkdir()
        links = [f"links/{number:05}-{names[number % len(names)]}" for number in range(NUM_LINKS)]
        for link in links:
            os.link(root / link.rpartition("-")[2], root / link)
        time.sleep(check_cache.FRESH_NS / 1e9 + 0.1)  # younger files are not noted
        seconds = time_in_turns(sides(root, names, links), rounds)
        targets = {what: TARGETS[what, case.format] for what in AGAINST}
        if not case.has_deep_target:
            targets = {**targets, "deep": None}
        return Result(
            case=case.name,
            num_files=len(names),
            bytes_per_file=sum((root / name).stat().st_size for name in names) // len(names),
            targets=targets,
            ratios={
                ours: {
                    clock: ratio(seconds[theirs][clock], seconds[ours][clock])
                    for clock in ("cpu", "wall")
                }
                for ours, theirs in AGAINST.items()
            },
            our_us_per_file={
                what: statistics.median(seconds[what]["cpu"])
                / len(names if what == "deep" else links)
                * 1e6
                for what in AGAINST
            },
        )


# --- results --------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Versions and processors that the ratios depend on."""
    return {
        "python": platform.python_version(),
        "pillow": PIL.__version__,
        "libjpeg_turbo": features.version("libjpeg_turbo"),
        "zlib": zlib.ZLIB_RUNTIME_VERSION,
        "machine": platform.machine(),
        "num_cpus": os.cpu_count(),
    }


def table(results: Sequence[Result]) -> Iterator[str]:
    """The lines of the table."""
    yield f"{'':25}{'KB':>6}  {'clock':6}{'header':20}{'deep':24}cached"
    for result in results:
        for clock in ("cpu", "wall"):
            header, deep, cached = (str(result.ratios[what][clock]) for what in AGAINST)
            name, size = (
                (result.case, result.bytes_per_file // 1000) if clock == "cpu" else ("", "")
            )
            yield f"{name:25}{size:>6}  {clock:6}{header:20}{deep:24}{cached}"
    yield ""
    yield f"{'microseconds a file, ours':25}{'':14}{'header':20}{'deep':24}cached"
    for result in results:
        header, deep, cached = (f"{result.our_us_per_file[what]:.0f}" for what in AGAINST)
        yield f"{result.case:25}{'':14}{header:20}{deep:24}{cached}"


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=15, help="Times every side is measured.")
@click.option("--cases", type=click.IntRange(1), default=len(CASES), help="Only the first so many.")
@json_option
def main(rounds: int, cases: int, json_file: Path | None) -> None:
    """Checking images by level: Pillow against ours."""
    about = machine() | {"rounds": rounds}
    try:
        results = [measure(case, rounds) for case in CASES[:cases]]
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    show_results(about, table(results), results, json_file)


if __name__ == "__main__":
    main()
