"""An image path is looked at once; at the deep level the verdict is that of a full decode."""

import io
import os
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from phi3v_data import image_check
from phi3v_data.image_check import (
    INFLATED_BYTES,
    ImageCheck,
    check_bytes,
    check_image,
)
from phi3v_data.image_place import ignores_case, names_by_lower_case, path_on_disk
from phi3v_data.images import ImageError, decode_image, probe_image
from PIL import Image

from tests.data.test_image_header import EDITS, ODD, SEEDS, Edit, chunk, edited, with_right_sums


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    return Image.effect_noise((width, height), 80).convert(mode)


def decodes(data: bytes) -> bool:
    try:
        decode_image(data)
    except ImageError:
        return False
    return True


# --- where ----------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    noise(9, 8).save(root / "a.jpg")
    noise(9, 8).save(root / "sub" / "b.png")
    noise(9, 8).save(tmp_path / "outside.png")
    return root


@pytest.mark.parametrize("level", ["header", "deep", "full"])
def test_an_image_that_is_well_is_ok_at_every_level(root: Path, level: Any):
    for path in ("a.jpg", "sub/b.png", "./a.jpg", "sub//b.png"):
        check = check_image(root, path, level)

        assert (check.kind, check.problem, check.cause) == ("ok", "", "")
        assert check.info == probe_image(root / path)
        assert check.num_bytes == (root / path).stat().st_size


def test_the_hash_is_that_of_the_file_unless_only_the_header_was_read(root: Path):
    digest = xxhash.xxh3_64_intdigest((root / "a.jpg").read_bytes())

    assert [check_image(root, "a.jpg", level).xxh3_64 for level in ("header", "deep", "full")] == [
        0,
        digest,
        digest,
    ]


@pytest.mark.parametrize(
    ("path", "kind", "problem"),
    [
        ("no.jpg", "missing", "does not exist"),
        ("no/a.jpg", "missing", "does not exist"),
        ("a.jpg/b.jpg", "missing", "does not exist"),
        ("sub", "missing", "is not a file"),
        ("sub/", "missing", "is not a file"),
        (".", "missing", "is not a file"),
        ("pipe", "missing", "is not a file"),
        ("dangling", "missing", "does not exist"),
        ("circle", "missing", "does not exist"),
        ("link_out.png", "outside", "is a link that leads out of the image root"),
        ("folder_out/outside.png", "outside", "is a link that leads out of the image root"),
        ("../outside.png", "outside", "leaves the image root by .."),
        ("/etc/passwd", "outside", "is absolute; paths are relative to the image root"),
    ],
)
def test_paths_that_lead_to_no_image_are_told_apart(root: Path, path: str, kind: str, problem: str):
    os.mkfifo(root / "pipe")
    (root / "dangling").symlink_to("nothing.png")
    (root / "circle").symlink_to("circle")
    (root / "link_out.png").symlink_to(root.parent / "outside.png")
    (root / "folder_out").symlink_to(root.parent)

    for level in ("header", "deep"):
        assert check_image(root, path, level) == ImageCheck(kind, problem)  # type: ignore[arg-type]


def test_links_within_the_root_are_followed(root: Path):
    (root / "link.png").symlink_to("sub/b.png")
    (root / "other").symlink_to("sub")

    assert check_image(root, "link.png") == check_image(root, "other/b.png")
    assert check_image(root, "link.png").kind == "ok"


def test_a_folder_that_becomes_a_link_out_is_noticed(root: Path):
    assert check_image(root, "sub/b.png").kind == "ok"
    (root / "sub").rename(root.parent / "moved")
    (root / "sub").symlink_to(root.parent / "moved")
    time.sleep(1.05)  # a folder is believed for a second

    assert check_image(root, "sub/b.png").kind == "outside"


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file that nobody can read")
def test_a_file_that_cannot_be_read_is_unreadable():
    check = check_image(Path("/proc/self"), "mem")

    assert (check.kind, check.cause) == ("missing", "unreadable")
    assert check.problem == f"cannot be read: {os.strerror(5)}"


def test_a_name_that_no_disk_can_hold_is_a_finding_not_a_crash(root: Path):
    assert check_image(root, "a" * 5000).problem.startswith("cannot be read: ")
    assert check_image(root, "\ud800.png").problem == "cannot be read: no such name"


@pytest.mark.parametrize("level", ["header", "deep", "full"])
def test_an_empty_file_is_empty(root: Path, level: Any):
    (root / "a.jpg").write_bytes(b"")
    check = check_image(root, "a.jpg", level)

    assert (check.kind, check.problem, check.cause) == ("undecodable", "is empty", "empty")


@pytest.mark.parametrize("level", ["header", "deep", "full"])
def test_a_bomb_is_too_large(root: Path, level: Any):
    (root / "a.ppm").write_bytes(b"P6 60000 60000 255\n")
    check = check_image(root, "a.ppm", level)

    assert (check.kind, check.cause) == ("undecodable", "too_large")
    assert check.problem == (
        "does not decode: 3,600,000,000 pixels: more than the 178,956,970 allowed"
    )


def test_a_disk_that_minds_case_is_told_from_hard_links(root: Path):
    is_blind = (root / "A.JPG").exists()
    assert ignores_case(str(root)) == is_blind
    if not is_blind:
        (root / "b").mkdir()
        (root / "b" / "x").write_bytes(b"")
        os.link(root / "b" / "x", root / "b" / "X")
        assert not ignores_case(str(root / "b"))
        assert check_image(root, "A.JPG").kind == "missing"
    assert names_by_lower_case(str(root)) == {"a.jpg": "a.jpg", "sub": "sub"} | (
        {} if is_blind else {"b": "b"}
    )


@pytest.mark.parametrize(
    ("path", "on_disk"),
    [
        ("sub/c.PNG", "Sub/C.png"),
        ("SUB/C.png", "Sub/C.png"),
        ("./Sub//C.png", "Sub/C.png"),
        ("top.png", "top.png"),
        ("sub/new.png", "Sub/new.png"),  # written after the folder was listed
    ],
)
def test_a_path_is_spelled_as_the_disk_has_it(path: str, on_disk: str):
    disk = {"": {"sub": "Sub", "top.png": "top.png"}, "Sub": {"c.png": "C.png"}}

    assert path_on_disk(path, disk.__getitem__) == on_disk


# --- what -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not ODD.is_dir(), reason="the shared odd images are not here")
@pytest.mark.parametrize("level", ["deep", "full"])
def test_every_odd_image_gets_the_verdict_of_a_full_decode(level: Any):
    refused: list[str] = []
    for path in sorted(path for path in ODD.rglob("*.*") if path.suffix != ".md"):
        check = check_bytes(path.read_bytes(), level)
        assert (check.kind == "ok") == decodes(path.read_bytes()), path
        if check.kind == "ok":
            assert check.info == probe_image(path), path
        else:
            refused.append(path.name)

    assert len(refused) == 12


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize(
    ("mode", "format", "options"),
    [
        ("RGB", "JPEG", {}),
        ("RGB", "JPEG", {"progressive": True}),
        ("L", "JPEG", {"restart_marker_blocks": 2}),
        ("CMYK", "JPEG", {"subsampling": 0}),
        ("RGB", "PNG", {}),
        ("P", "PNG", {}),
        ("RGB", "GIF", {}),
        ("RGB", "WEBP", {}),
        ("RGB", "BMP", {}),
        ("RGB", "TIFF", {}),
        ("RGB", "PPM", {}),
    ],
)
def test_a_file_cut_anywhere_is_refused_where_pillow_refuses_it(
    mode: str, format: str, options: dict[str, Any]
):
    data = encode(noise(40, 30, mode), format, **options)

    assert check_bytes(data).kind == "ok"
    for end in {*range(0, len(data), 1 + len(data) // 60), *range(len(data) - 20, len(data))}:
        assert (check_bytes(data[:end]).kind == "ok") == decodes(data[:end]), end
    assert check_bytes(data[: len(data) * 2 // 3]).kind == "undecodable"


def test_a_truncated_file_is_said_to_be_truncated():
    for format in ("JPEG", "PNG"):
        check = check_bytes(encode(noise(90, 90), format)[:-300])
        assert (check.kind, check.cause) == ("undecodable", "truncated")
        assert check.info is not None
        assert (check.info.width, check.info.height) == (90, 90)


def test_ordinary_files_are_known_to_be_whole_without_decoding(monkeypatch: pytest.MonkeyPatch):
    decoded: list[bytes] = []
    monkeypatch.setattr(image_check, "decode_image", decoded.append)
    for mode in ("RGB", "L", "CMYK"):
        for is_progressive in (False, True):
            data = encode(noise(50, 40, mode), "JPEG", progressive=is_progressive)
            assert check_bytes(data).kind == "ok"
    for mode in ("RGB", "L", "P", "RGBA", "I;16", "1"):
        image = Image.new(mode, (9, 8)) if mode == "I;16" else noise(200, 150, mode)
        assert check_bytes(encode(image, "PNG")).kind == "ok"
    assert decoded == []

    check_bytes(encode(noise(50, 40), "GIF"))
    assert len(decoded) == 1


def test_a_wrong_checksum_alone_does_not_condemn_a_png():
    data = bytearray(encode(noise(40, 30), "PNG"))
    data[-13] ^= 1  # the last byte of the last pixel chunk's checksum, which Pillow does not read

    assert decodes(bytes(data))
    assert check_bytes(bytes(data)).kind == "ok"


def test_small_pngs_are_decompressed_and_large_ones_in_their_first_part():
    def png(size: int, spoil_at: int) -> bytes:
        data = encode(Image.new("L", (size, size)), "PNG")
        rows = bytearray((1 + size) * size)
        rows[(1 + size) * spoil_at] = 7  # a row filter that there is not
        pixels = chunk(b"IDAT", zlib.compress(bytes(rows)))
        return data[:33] + pixels + chunk(b"IEND", b"")

    assert check_bytes(png(100, spoil_at=99)).kind == "undecodable"
    assert check_bytes(png(1000, spoil_at=5)).kind == "undecodable"
    beyond = INFLATED_BYTES // 1001 + 1
    assert check_bytes(png(1000, spoil_at=beyond)).kind == "ok"  # vouched for by its checksum
    assert check_bytes(png(1000, spoil_at=beyond), "full").kind == "undecodable"


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(SEEDS), EDITS, st.booleans())
def test_mutated_images_get_the_verdict_of_a_full_decode(
    data: bytes, edits: list[Edit], has_right_sums: bool
):
    data = edited(data, edits)
    if has_right_sums and data.startswith(b"\x89PNG"):
        data = with_right_sums(data)
    check = check_bytes(data)

    assert check.kind in ("ok", "undecodable")
    assert (check.kind == "ok") == decodes(data)
    if check.kind == "ok":
        assert check.info == probe_image(data)
    check_bytes(data, "header")  # says what it says, and does not crash
