from collections.abc import Iterator
from pathlib import Path

import pytest
from phi3v_data.convert import convert
from phi3v_data.converters import Rejected, get_converter, write_image
from phi3v_data.converters.function_converter import FunctionConverter, as_converter
from phi3v_data.jsonl import read_samples
from phi3v_data.schema import Sample, Turn

ROOT = Path(__file__).resolve().parents[2]
HERE = "tests.data.test_function_converter"


@pytest.fixture(autouse=True)
def tests_are_importable_in_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


def caption(
    path: Path, out_dir: Path, *, prompt: str = "Describe it.", shout: bool = False
) -> Iterator[Sample | Rejected]:
    """One caption a text file."""
    text = path.read_text()
    if not text:
        yield Rejected("empty", path.name)
        return
    image = write_image(out_dir, f"{path.stem}.jpg", path.with_suffix(".jpg").read_bytes())
    turn = Turn(images=(image,), user=prompt, assistant=text.upper() if shout else text)
    yield Sample(id=path.stem, source="captions", conversations=(turn,))


def write_captions(folder: Path, **texts: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
        (folder / f"{name}.jpg").write_bytes(b"a picture")
    return folder


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_function_of_a_file_is_a_converter(tmp_path: Path, num_workers: int) -> None:
    write_captions(tmp_path / "src", b="Bee.", a="Ant.", c="")
    write_captions(tmp_path / "src/val", d="Dog.")
    converter = FunctionConverter(caption, files="**/*.txt", settings={"shout": True})
    result = convert(converter, tmp_path / "src", tmp_path / "out", num_workers=num_workers)
    assert result.counts == {"train": 2, "val": 1}
    assert result.rejected == {"empty": 1}
    assert result.files["train"].name == "caption_train.jsonl"
    assert [s.conversations[0].assistant for s in read_samples(result.files["train"])] == [
        "ANT.", "BEE.",
    ]  # fmt: skip


def test_a_function_is_passed_as_it_is(tmp_path: Path) -> None:
    source = tmp_path / "lines.txt"
    source.write_text("a\nb\n")

    def lines(path: Path, out_dir: Path) -> Iterator[Sample]:
        for line in path.read_text().splitlines():
            turn = Turn(user="?", assistant=line)
            yield Sample(id=line, source="lines", conversations=(turn,))

    result = convert(lines, source, tmp_path / "out", num_workers=0)
    assert result.counts == {"train": 2}


def test_a_function_is_found_by_module_and_name_with_its_settings() -> None:
    converter = get_converter(f"{HERE}:caption", prompt="What?", files="*.txt")
    assert converter == FunctionConverter(caption, files="*.txt", settings={"prompt": "What?"})
    with pytest.raises(
        ValueError, match=r"has no option prompts; it has prompt, shout, files.*Did"
    ):
        get_converter(f"{HERE}:caption", prompts="What?")


def test_its_settings_are_part_of_the_run(tmp_path: Path) -> None:
    source = write_captions(tmp_path / "src", a="Ant.")

    def run(**settings: object) -> None:
        converter = FunctionConverter(caption, files="*.txt", settings=settings)
        convert(converter, source, tmp_path / "out", num_workers=0)

    run(shout=True)
    run(shout=True)
    with pytest.raises(ValueError, match=r"setting settings was {'shout': True}, now {}"):
        run()


def test_a_source_without_such_files_is_refused(tmp_path: Path) -> None:
    write_captions(tmp_path / "src", a="Ant.")
    with pytest.raises(ValueError, match=r"no file matches '\*\.xml' in"):
        convert(FunctionConverter(caption, files="*.xml"), tmp_path / "src", tmp_path / "out")


def test_what_is_neither_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a converter .* or a function.*got int"):
        as_converter(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"expected a function of \(path, out_dir\), got getcwd"):
        get_converter("os:getcwd")
