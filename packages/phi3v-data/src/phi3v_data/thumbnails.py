"""Small pictures of many images, together below a number of bytes.

    groups = [["a.0.jpg", "a.1.jpg", "a.2.jpg"], ["b.png"]]   # the files of each sample
    plan = plan_thumbnails(groups, budget_bytes=40_000_000)   # Plan(384, max_per_group=None)
    for file, thumbnail in draw(files, plan.edge_px): ...     # WebP, longest edge 384

A plan is found by drawing a few of the images in each size and taking the largest size of which
all fit. Where even small ones do not fit, fewer of each group are drawn.
"""

import io
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from phi3v_data.images import FORMATS, MAX_PIXELS, ImageError, probe_image, upright_rgb
from phi3v_data.worker_pool import num_cores

if TYPE_CHECKING:
    from PIL import Image

EDGES_PX = (1024, 768, 640, 512, 384, 320, 256, 192, 160, 128, 96, 64, 48)
"""Longest edges to choose from."""

PLANS: tuple[tuple[int | None, int], ...] = (
    *((None, edge) for edge in EDGES_PX if edge >= 128),
    *((4, edge) for edge in EDGES_PX if edge >= 128),
    *((2, edge) for edge in EDGES_PX if edge >= 96),
    *((1, edge) for edge in EDGES_PX),
)
"""(pictures of each group, longest edge), best first: four frames that can be recognised tell more
than sixteen that cannot."""

NUM_MEASURED = 32
"""Images drawn to estimate how large all of them will be."""

MARGIN = 1.06
"""Room for those that come out larger than the measured ones."""

QUALITY = 65


@dataclass(frozen=True, slots=True)
class Plan:
    """How pictures are drawn."""

    edge_px: int
    """Longest edge; smaller images stay as they are."""

    max_per_group: int | None
    """Pictures of each group, evenly spread; None: all."""


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """One image, small."""

    width: int
    """Of the image itself, upright, in pixels; 0 where not even its header can be read."""

    height: int
    data: bytes
    """WebP; empty if it cannot be drawn."""

    problem: str
    """Why it cannot; empty if it can."""


def spread(number: int, limit: int | None) -> list[int]:
    """At most `limit` of the positions 0 to number - 1, evenly: `spread(8, 4)` is 0, 2, 4, 6."""
    if limit is None or limit >= number:
        return list(range(number))
    return [position * number // limit for position in range(limit)]


def plan_thumbnails(groups: Sequence[Sequence[str]], budget_bytes: float) -> Plan:
    """The best of `PLANS` that is likely to fit; the last one if none is.

    Args:
        groups: the files of each sample; a file of several counts once.
        budget_bytes: for all pictures together.
    """
    files = sorted({file for group in groups for file in group})
    measured = [files[position] for position in spread(len(files), NUM_MEASURED)]
    with ThreadPoolExecutor(num_cores()) as executor:
        of_file = [sizes for sizes in executor.map(_sizes, measured) if sizes]
    plan = Plan(EDGES_PX[0], None)
    for max_per_group, edge in PLANS:
        plan = Plan(edge, max_per_group)
        if not of_file:
            break
        mean = sum(sizes[edge] for sizes in of_file) / len(of_file)
        if mean * MARGIN * _num_drawn(groups, max_per_group) <= budget_bytes:
            break
    return plan


def _sizes(file: str) -> dict[int, int]:
    """Longest edge → bytes of the picture; empty if it cannot be drawn, which drawing will say."""
    try:
        image = _load(file, EDGES_PX[0])
    except (ImageError, OSError):
        return {}
    sizes: dict[int, int] = {}
    size = 0
    for edge in EDGES_PX:
        if not sizes or max(image.size) > edge:  # larger ones are all the image as it is
            size = len(_encode(image, edge))
        sizes[edge] = size
    return sizes


def _num_drawn(groups: Sequence[Sequence[str]], max_per_group: int | None) -> int:
    drawn = {group[i] for group in groups for i in spread(len(group), max_per_group)}
    return len(drawn)


def draw(
    files: Sequence[str], edge_px: int, num_workers: int | None = None
) -> Iterator[tuple[str, Thumbnail]]:
    """Yield (file, its thumbnail) in order, drawn on threads: Pillow's codecs run beside Python."""
    workers = num_workers or num_cores()
    running: deque[tuple[str, Future[Thumbnail]]] = deque()
    executor = ThreadPoolExecutor(workers, thread_name_prefix="thumbnail")
    try:
        for file in files:
            running.append((file, executor.submit(draw_thumbnail, file, edge_px)))
            if len(running) > 8 * workers:
                name, future = running.popleft()
                yield name, future.result()
        while running:
            name, future = running.popleft()
            yield name, future.result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def draw_thumbnail(file: str, edge_px: int) -> Thumbnail:
    """One image as WebP with a longest edge of at most `edge_px`; never raises for its content."""
    width = height = 0
    try:
        info = probe_image(file)
        width, height = info.width, info.height
        return Thumbnail(width, height, _encode(_load(file, edge_px), edge_px), "")
    except (ImageError, OSError) as error:
        return Thumbnail(width, height, b"", str(error))


def _load(file: str, edge_px: int) -> "Image.Image":
    """An image, decoded no larger than it need be."""
    from PIL import Image

    with open(file, "rb") as stream:
        try:
            image = Image.open(stream, formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f"more than {MAX_PIXELS:,} pixels")
            image.draft("RGB", (edge_px, edge_px))  # a JPEG decodes at a half, quarter or eighth
        except (ImageError, MemoryError):
            raise
        except Exception as error:  # Pillow's decoders raise nearly any type on damaged bytes
            raise ImageError(str(error) or type(error).__name__) from error
        image = upright_rgb(image)
    image.thumbnail((edge_px, edge_px), reducing_gap=3.0)
    return image


def _encode(image: "Image.Image", edge_px: int) -> bytes:
    if max(image.size) > edge_px:
        image = image.copy()
        image.thumbnail((edge_px, edge_px), reducing_gap=3.0)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY, method=4)
    return buffer.getvalue()
