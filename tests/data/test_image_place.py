import os
from pathlib import Path

import pytest
from phi3v_data.image_place import ImagePlaces, MisplacedImage, find_place


def refusal(root: Path, path: str) -> tuple[str, str]:
    with pytest.raises(MisplacedImage) as caught:
        ImagePlaces(root).find(path)
    return caught.value.kind, str(caught.value)


def test_a_file_below_the_root_is_found(tmp_path: Path):
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "a.jpg").touch()

    assert ImagePlaces(tmp_path).find("val/a.jpg") == os.path.realpath(tmp_path / "val" / "a.jpg")


def test_a_path_or_link_out_of_the_root_is_refused(tmp_path: Path):
    root = tmp_path / "images"
    root.mkdir()
    (tmp_path / "secret.jpg").touch()
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "folder").symlink_to(tmp_path)

    assert refusal(root, "../secret.jpg")[0] == "outside"
    assert refusal(root, str(tmp_path / "secret.jpg"))[0] == "outside"
    assert refusal(root, "link.jpg") == ("outside", "is a link that leads out of the image root")
    assert refusal(root, "folder/secret.jpg")[0] == "outside"


def test_what_is_no_file_is_missing(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")

    assert refusal(tmp_path, "a.jpg") == ("missing", "does not exist")
    assert refusal(tmp_path, "folder") == ("missing", "is not a file")
    assert refusal(tmp_path, "pipe.jpg") == ("missing", "is not a file")
    assert refusal(tmp_path, "x" * 5000 + ".jpg")[0] == "missing"


def test_a_root_that_is_itself_a_link_is_fine(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.jpg").touch()
    (tmp_path / "root").symlink_to(tmp_path / "real")

    assert ImagePlaces(tmp_path / "root").find("a.jpg").endswith("real/a.jpg")


def test_a_place_has_the_state_of_the_file_and_its_path_without_links(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.jpg").write_bytes(b"12345")
    (tmp_path / "folder").symlink_to("real")
    (tmp_path / "b.jpg").symlink_to("folder/a.jpg")
    real = os.path.realpath(tmp_path / "real" / "a.jpg")

    for path in ("real/a.jpg", "folder/a.jpg", "b.jpg", "./real//a.jpg"):
        place = find_place(str(tmp_path), path)
        assert os.path.realpath(place.file) == place.real == real
        assert (place.status.st_size, place.ignores_case) == (5, False)


def test_what_the_system_refuses_is_told_from_what_is_not_there(tmp_path: Path):
    with pytest.raises(MisplacedImage, match="cannot be read: File name too long") as caught:
        find_place(str(tmp_path), f"{'x' * 5000}.jpg")

    assert (caught.value.kind, caught.value.cause) == ("missing", "unreadable")
