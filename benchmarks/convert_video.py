"""Clips to frames on disk: the cookbook's way, other decoders, and ours.

    uv run --group bench python benchmarks/convert_video.py --json convert_video.json

Every side turns the same clips into the same things: 8 JPEGs a clip (frame `floor(k * N / 8)`,
quality 75) and one JSON line. In turns, in one process, files in memory (`/dev/shm`; elsewhere by
`--scratch FOLDER`):

    PyAV, all          PyAV: decode and convert every frame, pick, PIL saves
    cookbook           what its script does: decode up to the last wanted frame, convert the wanted
    PyAV, timestamps   PyAV: seek to each wanted time and decode from there; PIL saves
    decord2            `get_batch`, one thread; PIL saves
    torchcodec         `get_frames_at`, exact, one thread; PIL saves
    OpenCV, read all   `read()` every frame, OpenCV's own threads; `imwrite`
    ours               `phi3v_data.convert` in this process: journal, manifest and all
    ours, 2 workers    the same with two processes, their start and end included

What is printed is how many times less time than the first two a side takes, per clip: the median
over the rounds, then the least and the largest. `cpu` counts all threads and child processes,
`wall` the time that passed: on a machine that others use too, believe `cpu`. The claim is about
decoding and converting all, and holds 2.0 in `cpu` for one process, 3.5 in `wall` for two.

`right` counts frames: those nearest, of all frames of OpenCV's own sequential decode with
auto-rotation, to the frame they should be (decoders convert colours differently; ours are compared
byte by byte). `one key frame` are clips that are hard to seek in, `others` further containers and
codecs. A side that fails on a clip has none of its frames right.

The clips: `--clips FOLDER` takes every video below it; by default those of UCF-101 in the test data
where they are beside the checkout, else some that this script makes. Few clips say little about
processes that take a second to start, so they are copied under other names, `--copies` times; the
other sides, whose time is per clip, run on a tenth.

torchcodec brings no FFmpeg. Where none is installed it is given PyAV's, which has the versions it
asks for, under the names it asks for: this script starts itself again with them in its path.
"""

import ctypes.util
import importlib.util
import io
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
import numpy.typing as npt
from phi3v_data.convert import convert
from phi3v_data.converters.clip_folders import EXTENSIONS, ClipFolders
from phi3v_data.video import frame_indices, read_frames
from PIL import Image
from ratios import Ratio, ratio
from results import json_option, show_results

TESTDATA = Path(__file__).resolve().parents[2] / "shared" / "testdata"

NUM_FRAMES = 8

PEER_SHARE = 10
"""Other sides than ours run on one in so many copies."""

Picture = npt.NDArray[np.uint8]
"""(height, width, 3), red first."""

Decode = Callable[[Path], Sequence[Picture]]
"""The wanted frames of a clip."""


@dataclass(frozen=True)
class Result:
    """One side, measured."""

    side: str
    problem: str | None
    """Why it could not run; then the rest is empty."""
    ratios: Mapping[str, Mapping[str, Ratio]]
    """Base → `cpu` or `wall`."""
    targets: Mapping[str, float]
    """The claims about "PyAV, all", by clock."""
    right: Mapping[str, tuple[int, int]]
    """Kind of clips → (frames right, frames wanted)."""


# --- clips ----------------------------------------------------------------------------------------


def make_clips(folder: Path) -> list[Path]:
    """Clips of UCF-101's size and length whose frames all differ: noise drifts over shapes."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    paths: list[Path] = []
    for number, num_frames in enumerate((120, 160, 240)):
        path = folder / f"made_{number}.avi"
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"XVID"), 25, (320, 240))
        coarse = random.integers(0, 256, (12, 30, 3), dtype=np.uint8)
        wide = cv2.resize(coarse, (800, 320), interpolation=cv2.INTER_CUBIC).astype(np.int16)
        for index in range(num_frames):
            view = wide[20 + index % 40 : 260 + index % 40, 2 * index % 480 :][:, :320]
            grain = random.normal(0, 4, (240, 320, 1)).astype(np.int16)
            writer.write((view + grain).clip(0, 255).astype(np.uint8))
        writer.release()
        paths.append(path)
    return paths


def list_clips(folder: Path) -> list[Path]:
    """Every video below a folder."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)


def copy_clips(clips: Sequence[Path], root: Path, copies: int) -> Path:
    """`root/train/<Class>/<clip>_<copy>.avi`, one class a clip."""
    for number, clip in enumerate(clips):
        folder = root / "train" / f"class{number:02}"
        folder.mkdir(parents=True)
        for copy in range(copies):
            shutil.copyfile(clip, folder / f"{clip.stem}_{copy:03}{clip.suffix}")
    return root


def to_picture(pixels: Any) -> Picture:
    """In one piece, whatever a decoder calls its type."""
    return np.ascontiguousarray(pixels, dtype=np.uint8)


def decode_all(path: Path) -> list[Picture]:
    """OpenCV's own sequential decode, by its defaults."""
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    frames: list[Picture] = []
    while True:
        done, frame = capture.read()
        if not done:
            capture.release()
            return frames
        frames.append(to_picture(frame[:, :, ::-1]))


# --- the other ways -------------------------------------------------------------------------------


def decode_cookbook(path: Path) -> Sequence[Picture]:
    """Count by the header; decode up to the last wanted frame; convert the wanted."""
    import av  # pyright: ignore[reportMissingImports]

    with av.open(str(path)) as container:
        wanted = frame_indices(container.streams.video[0].frames, NUM_FRAMES)
        kept = {}
        for index, frame in enumerate(container.decode(video=0)):
            if index > wanted[-1]:
                break
            if index in wanted:
                kept[index] = frame
        return [to_picture(kept[index].to_ndarray(format="rgb24")) for index in wanted]


def decode_pyav_all(path: Path) -> Sequence[Picture]:
    """Decode and convert all, then pick."""
    import av  # pyright: ignore[reportMissingImports]

    with av.open(str(path)) as container:
        frames = [
            to_picture(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)
        ]
    return [frames[index] for index in frame_indices(len(frames), NUM_FRAMES)]


def decode_pyav_timestamps(path: Path) -> Sequence[Picture]:
    """Seek to the key frame before each wanted time, and decode until it is reached."""
    import av  # pyright: ignore[reportMissingImports]

    pictures: list[Picture] = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        rate, base = stream.average_rate, stream.time_base
        assert rate is not None
        assert base is not None
        for index in frame_indices(stream.frames, NUM_FRAMES):
            wanted = (stream.start_time or 0) + int(index / rate / base)
            container.seek(wanted, stream=stream)
            found = None
            for frame in container.decode(stream):
                found = frame
                if frame.pts is not None and frame.pts >= wanted:
                    break
            assert found is not None
            pictures.append(to_picture(found.to_ndarray(format="rgb24")))
    return pictures


def decode_decord(path: Path) -> Sequence[Picture]:
    """One batch."""
    from decord import VideoReader  # pyright: ignore[reportMissingImports]

    reader = VideoReader(str(path), num_threads=1)
    return list(reader.get_batch(list(frame_indices(len(reader), NUM_FRAMES))).asnumpy())


def decode_torchcodec(path: Path) -> Sequence[Picture]:
    """One batch, in its exact mode."""
    from torchcodec.decoders import (  # pyright: ignore[reportMissingImports]
        VideoDecoder,  # pyright: ignore[reportPrivateImportUsage]
    )

    decoder = VideoDecoder(
        str(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact"
    )
    indices = list(frame_indices(len(decoder), NUM_FRAMES))
    return list(decoder.get_frames_at(indices=indices).data.numpy())


def decode_opencv_all(path: Path) -> Sequence[Picture]:
    """Read all, then pick."""
    frames = decode_all(path)
    return [frames[index] for index in frame_indices(len(frames), NUM_FRAMES)]


def decode_ours(path: Path) -> Sequence[Picture]:
    """What the converter encodes."""
    return [frame[:, :, ::-1] for frame in read_frames(path, NUM_FRAMES)]


def save_by_pil(picture: Picture, path: Path) -> None:
    """As the cookbook does."""
    Image.fromarray(picture).save(path)


def save_by_opencv(picture: Picture, path: Path) -> None:
    """OpenCV takes blue first; 75 is PIL's quality, not OpenCV's."""
    cv2.imwrite(str(path), picture[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 75])


PEERS: Mapping[str, tuple[Decode, Callable[[Picture, Path], None]]] = {
    "PyAV, all": (decode_pyav_all, save_by_pil),
    "cookbook": (decode_cookbook, save_by_pil),
    "PyAV, timestamps": (decode_pyav_timestamps, save_by_pil),
    "decord2": (decode_decord, save_by_pil),
    "torchcodec": (decode_torchcodec, save_by_pil),
    "OpenCV, read all": (decode_opencv_all, save_by_opencv),
}

BASES = ("PyAV, all", "cookbook")
"""What the others are compared with."""

OURS = {"ours": 0, "ours, 2 workers": 2}
"""Side → processes; 0: this one."""

TARGETS: Mapping[str, Mapping[str, float]] = {
    "ours": {"cpu": 2.0},
    "ours, 2 workers": {"wall": 3.5},
}


def convert_by(name: str, source: Path, out: Path) -> None:
    """Clips under `source` to images and JSON lines, as the cookbook's script lays them out."""
    decode, save = PEERS[name]
    clips = list_clips(source)
    labels = sorted({path.parent.name for path in clips})
    prompt = f"Classify the video into one of the following classes: {', '.join(labels)}."
    out.mkdir()
    with open(out / "train.jsonl", "w") as file:
        for number, path in enumerate(clips):
            stem = path.relative_to(source).with_suffix("")
            images = [f"{stem}.{k}.jpg" for k in range(NUM_FRAMES)]
            (out / "images" / stem).parent.mkdir(parents=True, exist_ok=True)
            for picture, image in zip(decode(path), images, strict=True):
                save(picture, out / "images" / image)
            turn = {"images": images, "user": prompt, "assistant": path.parent.name}
            sample = {"id": f"train-{number:010d}", "source": "ucf101", "conversations": [turn]}
            file.write(json.dumps(sample) + "\n")


def convert_ours(name: str, source: Path, out: Path) -> None:
    """The converter as users run it.

    Raises:
        ValueError: a clip was rejected.
    """
    result = convert(ClipFolders(num_frames=NUM_FRAMES), source, out, num_workers=OURS[name])
    if result.rejected:
        raise ValueError(f"rejected {result.rejected}: not comparable")


# --- measuring ------------------------------------------------------------------------------------


def cpu_seconds() -> float:
    """Of this process, all threads, and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(times.ru_utime + times.ru_stime for times in used)


def time_side(name: str, source: Path, scratch: Path) -> dict[str, float]:
    """Seconds a clip, by clock."""
    out = scratch / "out"
    side = convert_ours if name in OURS else convert_by
    cpu, wall = cpu_seconds(), time.perf_counter()
    side(name, source, out)
    seconds = {"cpu": cpu_seconds() - cpu, "wall": time.perf_counter() - wall}
    shutil.rmtree(out)
    num_clips = len(list_clips(source))
    return {clock: value / num_clips for clock, value in seconds.items()}


def find_problem(name: str, clip: Path) -> str | None:
    """Run a peer once: imports, caches, and whether it works here at all."""
    try:
        PEERS[name][0](clip)
    except (ImportError, OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


def count_right(decode: Decode, path: Path, every: Sequence[Picture], is_exact: bool) -> int:
    """How many of the wanted frames a decoder gives in their places."""
    try:
        pictures = decode(path)
    except Exception:  # peers raise nearly anything; the count says that they failed
        return 0
    num_right = 0
    for picture, index in zip(pictures, frame_indices(len(every), NUM_FRAMES), strict=True):
        if picture.shape != every[index].shape:
            continue
        if is_exact:
            num_right += np.array_equal(picture, every[index])
        else:
            picture = to_picture(picture)
            distances = [cv2.norm(picture, other, cv2.NORM_L1) for other in every]
            num_right += distances[index] <= min(distances)
    return num_right


def count_key_frames(path: Path) -> int:
    """How many packets of the video claim to be key frames."""
    import av  # pyright: ignore[reportMissingImports]

    with av.open(str(path), metadata_errors="ignore") as container:
        return sum(packet.is_keyframe for packet in container.demux(video=0) if packet.size)


def check_right(
    names: Sequence[str], clips: Sequence[Path], others: Sequence[Path]
) -> dict[str, dict[str, tuple[int, int]]]:
    """Side → kind of clips → (frames right, frames wanted)."""
    right: dict[str, dict[str, tuple[int, int]]] = {name: {} for name in names}
    for path in (*clips, *others):
        every = decode_all(path)
        kinds = ["clips"] if path in clips else ["others"]
        if path in clips and count_key_frames(path) == 1:
            kinds.append("one key frame")
        for name in names:
            decode = PEERS[name][0] if name in PEERS else decode_ours
            num_right = count_right(decode, path, every, name in OURS)
            for kind in kinds:
                so_far, wanted = right[name].get(kind, (0, 0))
                right[name][kind] = so_far + num_right, wanted + NUM_FRAMES
    return right


def check_same_bytes(source: Path, scratch: Path) -> None:
    """Refuse to compare times where the JPEGs are not the cookbook's.

    Raises:
        ValueError: a file differs.
    """
    sides = {"cookbook": convert_by, "ours": convert_ours}
    files: dict[str, dict[str, bytes]] = {}
    for name, side in sides.items():
        side(name, source, scratch / name)
        images = scratch / name / "images"
        files[name] = {
            path.relative_to(images).as_posix(): path.read_bytes() for path in images.rglob("*.jpg")
        }
    if files["cookbook"] != files["ours"]:
        raise ValueError("our JPEGs are not the cookbook's, byte for byte: not comparable")


def measure(
    clips: Sequence[Path],
    others: Sequence[Path],
    peers: Sequence[str],
    rounds: int,
    copies: int,
    scratch: Path,
) -> list[Result]:
    """Check what comes out, then time all sides in turns; every other round goes backwards."""
    problems = {name: find_problem(name, clips[0]) for name in PEERS if name in peers}
    names = [name for name, problem in problems.items() if problem is None] + list(OURS)
    for name in BASES:
        if name not in names:
            raise ValueError(
                f"{name} does not run here ({problems[name]}): nothing to compare with"
            )
    once = copy_clips(clips, scratch / "once", 1)
    many = copy_clips(clips, scratch / "many", copies)
    some = copy_clips(clips, scratch / "some", max(1, copies // PEER_SHARE))
    check_same_bytes(once, scratch)
    right = check_right(names, clips, others)

    seconds: dict[str, dict[str, list[float]]] = {n: {"cpu": [], "wall": []} for n in names}
    for number in range(rounds):
        for name in names[:: -1 if number % 2 else 1]:
            source = many if name in OURS else some
            for clock, value in time_side(name, source, scratch).items():
                seconds[name][clock].append(value)
    results: list[Result] = []
    for name in (*problems, *OURS):
        bases = BASES if name in seconds else ()
        ratios = {
            base: {c: ratio(seconds[base][c], seconds[name][c]) for c in ("cpu", "wall")}
            for base in bases
        }
        results.append(
            Result(
                side=name,
                problem=problems.get(name),
                ratios=ratios,
                targets=TARGETS.get(name, {}),
                right=right.get(name, {}),
            )
        )
    return results


# --- results --------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Versions and processors that the ratios depend on."""
    build = io.StringIO(cv2.getBuildInformation())
    found = next((line.split()[-1] for line in build if "avcodec:" in line), "none")
    packages = ("opencv-python-headless", "av", "decord2", "torchcodec", "pillow", "numpy")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "opencv_avcodec": found.strip("()"),
        "machine": platform.machine(),
        "num_cpus": os.cpu_count(),
    }


def table(results: Sequence[Result]) -> Iterator[str]:
    """The lines of the table."""
    for base in BASES:
        target = "target" if base == BASES[0] else ""
        yield f"{base + ' / side':20}{'cpu':24}{'wall':24}{target}".rstrip()
        for result in results:
            if result.problem is not None:
                yield f"{result.side:20}does not run here: {result.problem}"
                continue
            times = "".join(f"{result.ratios[base][clock]!s:24}" for clock in ("cpu", "wall"))
            claims = ", ".join(f"{clock} >= {value}" for clock, value in result.targets.items())
            yield f"{result.side:20}{times}{claims if target else ''}".rstrip()
        yield ""
    kinds = list(dict.fromkeys(kind for result in results for kind in result.right))
    yield f"{'frames right':20}" + "".join(f"{kind:20}" for kind in kinds).rstrip()
    for result in results:
        if result.right:
            counts = [
                f"{right} of {wanted}" for right, wanted in (result.right[kind] for kind in kinds)
            ]
            yield f"{result.side:20}" + "".join(f"{count:20}" for count in counts).rstrip()


def link_ffmpeg(folder: Path) -> bool:
    """Link PyAV's FFmpeg libraries into `folder` as `libavcodec.so.62` and so on, if need be."""
    spec = importlib.util.find_spec("av")
    if ctypes.util.find_library("avcodec") or spec is None or spec.origin is None:
        return False
    libraries = Path(spec.origin).parents[1] / "av.libs"
    for library in libraries.glob("*.so*"):
        (folder / library.name).symlink_to(library)  # where they look for each other
        match = re.fullmatch(r"(lib(?:av|sw)[a-z]+)-\w+(\.so\.\d+)\..*", library.name)
        if match:
            (folder / (match[1] + match[2])).symlink_to(library)
    return any(folder.iterdir())


def restart_with_ffmpeg() -> None:
    """Where torchcodec has no FFmpeg, run this command in a process that has, and exit as it."""
    with tempfile.TemporaryDirectory() as folder:
        if link_ffmpeg(Path(folder)):
            paths = [folder, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
            environment = os.environ | {"LD_LIBRARY_PATH": os.pathsep.join(paths)}
            command = [sys.executable, __file__, *sys.argv[1:], "--started_again"]
            sys.exit(subprocess.run(command, env=environment, check=False).returncode)


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=7, help="Times every side is measured.")
@click.option("--copies", type=click.IntRange(1), default=200, help="Of every clip.")
@click.option(
    "--clips",
    "clips_folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Videos to use.",
)
@click.option(
    "--peer", "peers", type=click.Choice(list(PEERS)), multiple=True, help="Only these; repeatable."
)
@click.option("--made", is_flag=True, help="Use clips made by this script.")
@json_option
@click.option(
    "--scratch",
    "scratch_folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Where clips are copied to and converted.",
)
@click.option("--started_again", is_flag=True, hidden=True)
def main(
    rounds: int,
    copies: int,
    clips_folder: Path | None,
    peers: tuple[str, ...],
    made: bool,
    json_file: Path | None,
    scratch_folder: Path | None,
    started_again: bool,
) -> None:
    """Clips to frames on disk: the cookbook's way, other decoders, and ours."""
    if importlib.util.find_spec("av") is None:
        raise click.ClickException(
            "the peers are not installed; run `uv run --group bench python "
            "benchmarks/convert_video.py`"
        )
    if not started_again:
        restart_with_ffmpeg()
    # In memory where there is such a file system: the disk is the same for all sides.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=scratch_folder or memory) as folder:
        scratch = Path(folder)
        default = TESTDATA / "ucf101" / "UCF-101"
        found = clips_folder or (default if default.is_dir() and not made else None)
        clips = make_clips(scratch / "made") if found is None else list_clips(found)
        if not clips:
            raise click.ClickException(f"no video below {found}")
        others = list_clips(TESTDATA / "video_other") if found == default else []
        about = machine() | {
            "rounds": rounds,
            "copies": copies,
            "clips": f"{len(clips)} {'made' if found is None else found.name}",
        }
        try:
            chosen = (*BASES, *peers) if peers else tuple(PEERS)
            results = measure(clips, others, chosen, rounds, copies, scratch)
        except ValueError as error:
            raise click.ClickException(str(error)) from error
    show_results(about, table(results), results, json_file)


if __name__ == "__main__":
    main()
