"""For every rule on images a file that breaks it, with the message, and one that passes them all.

I101 to I105 are in `test_rules.py` too, with all the ways to break them.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from phi3v_data.diagnostics import Diagnostic
from phi3v_data.image_check import ImageCheck, check_image
from phi3v_data.images import ORIENTATION_TAG, ImageInfo
from phi3v_data.rules import RULES, Context, Finding
from phi3v_data.rules.images import is_plain, unused_files
from phi3v_data.schema import Sample, Turn
from PIL import Image

from tests.data.rule_lines import find, only, turn

IMAGE_RULES = {
    rule.code: rule for rule in RULES if rule.code.startswith("I") and rule.subject == "sample"
}

GOOD = ImageInfo(20, 10, "RGB", "PNG", 1)


def context(path: str, check: ImageCheck, num_crops: int = 16) -> Context:
    return Context(
        file="x.jsonl",
        line_number=1,
        image_root="/images",
        images={path: check},
        ids={},
        allow_missing_answer=False,
        num_crops=num_crops,
    )


def findings(path: str, check: ImageCheck, num_crops: int = 16) -> dict[str, Finding]:
    """Code -> what the rules on images say of a sample with that image."""
    turns = (Turn(images=("other.png", path), user="u", assistant="a"),)
    sample = Sample(id="a", source="toy", conversations=turns)
    about = context(path, check, num_crops)
    return {
        code: finding for code, rule in IMAGE_RULES.items() for finding in rule.check(sample, about)
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    return tmp_path


def report(root: Path, path: str) -> list[Diagnostic]:
    return find(root, turn(images=[path]))


@pytest.mark.parametrize("mode", ["RGB", "L", "1"])
@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.bmp"])
def test_an_ordinary_picture_passes_all_rules(root: Path, mode: str, name: str):
    Image.new(mode, (20, 10)).save(root / "images" / name)

    assert report(root, name) == []


@pytest.mark.parametrize(
    ("content", "message", "help"),
    [
        (lambda data: b"", "image 'x.jpg' is empty", "fetch it again: nothing of it has arrived"),
        (
            lambda data: data[: len(data) // 2],
            "image 'x.jpg' does not decode: image file is truncated (N bytes not processed)",
            "fetch it again: its end is missing",
        ),
        (
            lambda data: b"<html>not found</html>",
            "image 'x.jpg' does not decode: not an image in a format that is read "
            "(JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM)",
            "",
        ),
    ],
)
def test_I102_says_what_became_of_the_file(
    root: Path, content: Callable[[bytes], bytes], message: str, help: str
):
    path = root / "images" / "x.jpg"
    Image.effect_noise((100, 100), 80).save(path)
    path.write_bytes(content(path.read_bytes()))
    found = only(report(root, "x.jpg"), "I102")

    said = re.sub(r"\d+ bytes", "N bytes", found.message)  # depends on the release of libjpeg
    assert (found.severity, said, found.help) == ("error", message, help)
    assert found.pointer == "/conversations/0/images/0"


def test_I106_reports_a_file_that_is_there_and_cannot_be_read():
    check = ImageCheck("missing", "cannot be read: Permission denied", cause="unreadable")
    found = findings("x.png", check)

    assert found == {
        "I106": Finding(
            "image 'x.png' cannot be read: Permission denied",
            "check who may read it and its folder",
            "/conversations/0/images/1",
        )
    }


def test_I106_comes_of_files_that_the_system_refuses():
    # /proc/self/mem is a file that nobody can read from its start, not even root.
    if not Path("/proc/self/mem").exists():
        pytest.skip("no /proc here")
    (code,) = findings("mem", check_image(Path("/proc/self"), "mem"))

    assert code == "I106"


def test_I107_reports_a_decompression_bomb(root: Path):
    (root / "images" / "x.ppm").write_bytes(b"P6 60000 60000 255\n")
    found = only(report(root, "x.ppm"), "I107")

    assert (found.severity, found.message, found.help) == (
        "error",
        "image 'x.ppm' does not decode: 3,600,000,000 pixels: more than the 178,956,970 allowed",
        "make it smaller: the model sees at most 1,806,336",
    )


def test_I108_reports_a_name_that_differs_in_case_where_the_disk_ignores_it():
    found = findings("Val/x.png", ImageCheck("ok", info=GOOD, path_on_disk="val/x.png"))

    assert found == {
        "I108": Finding(
            "image 'Val/x.png' is 'val/x.png' on disk",
            "write it as it is on disk: only disks that ignore case find it",
            "/conversations/0/images/1",
        )
    }


@pytest.mark.parametrize(
    ("size_wh", "is_tiny"),
    [((1, 1), True), ((7, 7), True), ((7, 8), False), ((8, 7), False), ((28, 28), False)],
)
def test_I109_reports_what_is_hardly_a_picture(root: Path, size_wh: tuple[int, int], is_tiny: bool):
    Image.new("RGB", size_wh).save(root / "images" / "x.png")
    found = report(root, "x.png")

    assert [d.code for d in found] == (["I109"] if is_tiny else [])
    if is_tiny:
        width, height = size_wh
        assert found[0].severity == "warning"
        assert found[0].message == (
            f"image 'x.png' is {width}x{height} (width x height): hardly a picture"
        )


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 6
    Image.new("RGB", (20, 10)).save(path, exif=exif)


def key_colour(path: Path) -> None:
    Image.new("RGB", (20, 10)).save(path, transparency=(0, 0, 0))


def animated(path: Path) -> None:
    frames = [Image.effect_noise((20, 10), 50) for _ in range(2)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def of_mode(mode: str) -> Callable[[Path], None]:
    return lambda path: Image.new(mode, (20, 10)).save(path)


@pytest.mark.parametrize(
    ("code", "name", "write", "message", "help"),
    [
        (
            "I111",
            "x.jpg",
            turned,
            "image 'x.jpg' is stored turned: EXIF orientation 6",
            "it is turned upright for training; coordinates in answers must be of that",
        ),
        (
            "I112",
            "x.jpg",
            of_mode("CMYK"),
            "image 'x.jpg' is CMYK",
            "its colours will be harsher than in a viewer; save it as RGB",
        ),
        (
            "I113",
            "x.png",
            of_mode("P"),
            "image 'x.png' has a palette",
            "it is converted to RGB; use the original if it was reduced to a palette",
        ),
        (
            "I114",
            "x.png",
            of_mode("RGBA"),
            "image 'x.png' has transparency",
            "alpha is dropped, not blended; lay it on a background if it is see-through",
        ),
        (
            "I114",
            "x.png",
            key_colour,
            "image 'x.png' has transparency",
            "alpha is dropped, not blended; lay it on a background if it is see-through",
        ),
        (
            "I115",
            "x.png",
            of_mode("I;16"),
            "image 'x.png' has more than 8 bits a sample",
            "of each the high byte is kept; scale it to 8 bits if it uses little of the range",
        ),
        *(
            (
                "I116",
                name,
                animated,
                f"image '{name}' has several frames",
                "only the first is seen; give the others as images of their own if they matter",
            )
            for name in ("x.gif", "x.png", "x.webp", "x.tif")
        ),
    ],
)
def test_what_training_changes_in_a_picture_is_a_warning(
    root: Path, code: str, name: str, write: Callable[[Path], None], message: str, help: str
):
    write(root / "images" / name)
    found = only(report(root, name), code)

    assert (found.severity, found.message, found.help) == ("warning", message, help)


def test_I113_leaves_gifs_which_always_have_a_palette(root: Path):
    Image.new("P", (20, 10)).save(root / "images" / "x.gif")

    assert report(root, "x.gif") == []


def test_the_previews_in_a_camera_file_are_no_animation(root: Path):
    frames = [Image.new("RGB", (20, 10), color) for color in ("red", "blue")]
    frames[0].save(root / "images" / "x.jpg", "MPO", save_all=True, append_images=frames[1:])

    assert check_image(root / "images", "x.jpg").info == ImageInfo(20, 10, "RGB", "MPO", 1)
    assert report(root, "x.jpg") == []


CHECKS: list[tuple[str, ImageCheck]] = [
    ("x.png", ImageCheck("ok", info=GOOD)),
    ("noextension", ImageCheck("ok", info=GOOD)),
    ("x.jpg", ImageCheck("ok", info=GOOD)),
    ("x.png", ImageCheck("missing", "does not exist")),
    ("x.png", ImageCheck("missing", "cannot be read", cause="unreadable")),
    ("x.png", ImageCheck("outside", "is absolute")),
    ("x.png", ImageCheck("undecodable", "is empty", cause="empty")),
    ("x.png", ImageCheck("undecodable", "x", info=GOOD, cause="too_large")),
    ("x.png", ImageCheck("ok", info=GOOD, path_on_disk="X.png")),
    *(
        ("x.png", ImageCheck("ok", info=ImageInfo(*fields)))
        for fields in [
            (5376, 1, "L", "PNG", 1),
            (5377, 1, "L", "PNG", 1),
            (7, 7, "RGB", "PNG", 1),
            (7, 8, "RGB", "PNG", 1),
            (20, 10, "RGB", "PNG", 3),
            (20, 10, "CMYK", "PNG", 1),
            (20, 10, "P", "PNG", 1),
            (20, 10, "P", "GIF", 1),
            (20, 10, "RGB", "PNG", 1, 16),
            (20, 10, "RGB", "PNG", 1, 8, True),
            (20, 10, "RGB", "PNG", 1, 8, False, True),
        ]
    ),
]


@pytest.mark.parametrize(("path", "check"), CHECKS)
@pytest.mark.parametrize("num_crops", [1, 16])
def test_an_image_is_plain_only_where_no_rule_has_anything_to_say(
    path: str, check: ImageCheck, num_crops: int
):
    if is_plain(path, check, num_crops):
        assert findings(path, check, num_crops) == {}


def test_most_images_are_plain():
    assert is_plain("x.png", ImageCheck("ok", info=GOOD), 16)
    assert is_plain("x.jpg", ImageCheck("ok", info=ImageInfo(640, 480, "L", "JPEG", 1)), 1)
    assert not is_plain("x.png", ImageCheck("ok", info=ImageInfo(20, 10, "P", "PNG", 1)), 16)


# --- unused files ---------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b/1.png", "b/2.jpg", "a.JPEG", "z.webp", "notes.txt", "x.jsonl", "b/c/d.tiff"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def test_unused_images_are_named_in_order_of_folder_and_name(tree: Path):
    assert list(unused_files(tree, set())) == [
        "a.JPEG",
        "z.webp",
        "b/1.png",
        "b/2.jpg",
        "b/c/d.tiff",
    ]
    assert list(unused_files(tree, {"a.JPEG", "b/2.jpg"})) == ["z.webp", "b/1.png", "b/c/d.tiff"]


def test_paths_written_in_an_odd_way_count_as_used(tree: Path):
    used = {"./a.JPEG", "b//1.png", "b/./2.jpg", "z.webp", "b/c/d.tiff", "no.png"}

    assert list(unused_files(tree, used)) == []


def test_links_to_folders_are_not_followed(tree: Path):
    (tree / "b" / "circle").symlink_to(tree)
    (tree / "link.png").symlink_to("b/1.png")

    assert "link.png" in list(unused_files(tree, set()))
    assert not any("circle" in path for path in unused_files(tree, set()))


def test_the_first_unused_file_comes_before_all_folders_are_listed(tree: Path):
    found = unused_files(tree, set())
    assert next(found) == "a.JPEG"
    (tree / "b" / "late.png").write_bytes(b"")

    assert "b/late.png" in list(found)


def test_a_root_that_is_not_there_is_an_error(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        next(unused_files(tmp_path / "no", set()))
