import pickle
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from phi3v_data.converters import (
    Converter,
    Item,
    Rejected,
    get_converter,
    list_converters,
    write_image,
)
from phi3v_data.schema import Sample


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The name of an importable module with a converter class and a ready converter."""
    name = f"captions_{abs(hash(request.node.name))}"
    code = """
        class Captions:
            name = "captions"
            def __init__(self, lang="en"): self.lang = lang
            def discover(self, source): yield from ()
            def convert(self, item, out_dir): yield from ()
        ready = Captions("de")
        nothing = object()
        class Demanding(Captions):
            def __init__(self, lang): self.lang = lang
    """
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_built_in_converters_are_found_by_entry_point() -> None:
    assert list_converters()["ucf101"] == "phi3v_data.converters.ucf101:Ucf101"
    converter = get_converter("ucf101", num_frames=4)
    assert isinstance(converter, Converter)
    assert converter.name == "ucf101"


def test_an_installed_package_offers_converters(module: str, tmp_path: Path) -> None:
    info = tmp_path / "third_party-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[phi3v_data.converters]\nmine = {module}:Captions\n")
    assert list_converters()["mine"] == f"{module}:Captions"
    assert get_converter("mine").name == "captions"


def test_a_broken_installed_converter_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "third_party-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[phi3v_data.converters]\nmine = gone:Captions\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"'mine' is installed but broken \(gone:Captions\)"):
        get_converter("mine")


def test_module_colon_object_takes_a_class_or_a_ready_converter(module: str) -> None:
    assert vars(get_converter(f"{module}:Captions", lang="fr")) == {"lang": "fr"}
    assert vars(get_converter(f"{module}:ready")) == {"lang": "de"}


def test_an_unknown_name_lists_what_is_there_and_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"Did you mean 'ucf101'\? Installed: .*ucf101"):
        get_converter("ufc101")
    with pytest.raises(ValueError, match=r"no converter named 'xyz'\. Installed: "):
        get_converter("xyz")


@pytest.mark.parametrize("name", ["no_such_module:X", "phi3v_data.schema:Sampel", ":X", "os:"])
def test_an_object_that_cannot_be_imported_is_one_clear_error(name: str) -> None:
    with pytest.raises(ValueError, match="expected module:object"):
        get_converter(name)


def test_an_object_that_is_no_converter_is_refused(module: str) -> None:
    with pytest.raises(ValueError, match="is no converter: expected `name`, `discover"):
        get_converter(f"{module}:nothing")


def test_an_option_the_converter_does_not_know_is_an_error(module: str) -> None:
    with pytest.raises(
        ValueError, match=r"no option num_frame; it has num_frames, .* Did you mean"
    ):
        get_converter("ucf101", num_frame=4)
    with pytest.raises(ValueError, match="takes no options, got lang"):
        get_converter(f"{module}:ready", lang="fr")
    with pytest.raises(ValueError, match="missing 1 required positional argument: 'lang'"):
        get_converter(f"{module}:Demanding")


def test_items_are_picklable_and_sort_in_output_order() -> None:
    items = [Item(2, "a", "a", payload=object), Item(0, "c", "c"), Item(1, "b", "b", "val")]
    assert [item.key for item in sorted(items)] == ["c", "b", "a"]
    assert pickle.loads(pickle.dumps(items)) == items


def test_any_object_of_the_right_shape_is_a_converter() -> None:
    class Mine:
        name = "mine"

        def discover(self, source: Path) -> Iterator[Item]:
            yield from ()

        def convert(self, item: Item, out_dir: Path) -> Iterator[Sample | Rejected]:
            yield from ()

    converter: Converter = Mine()
    assert isinstance(converter, Converter)


def test_images_are_written_under_images_without_left_overs(tmp_path: Path) -> None:
    assert write_image(tmp_path, "train/a.b/c.0.jpg", b"1") == "train/a.b/c.0.jpg"
    write_image(tmp_path, "train/a.b/c.0.jpg", b"2")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files == [tmp_path / "images/train/a.b/c.0.jpg"]
    assert files[0].read_bytes() == b"2"


@pytest.mark.parametrize("name", ["../a.jpg", "/a.jpg", "a/../../b.jpg", ""])
def test_an_image_never_lands_outside(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="inside images/"):
        write_image(tmp_path, name, b"")
    assert list(tmp_path.iterdir()) == []
