from collections.abc import Iterator
from pathlib import Path

import pytest
from phi3v_data import JsonlError, Sample, Turn, read_samples, write_samples
from phi3v_data.jsonl import default_image_root


def sample(id: str, answer: str | None = "a") -> Sample:
    turns = (Turn(images=("ü/1.jpg",), user="Zeile 1\nZeile 2 ✓\u2028", assistant=answer),)
    return Sample(id=id, source="toy", conversations=turns)


def test_samples_written_are_the_samples_read(tmp_path: Path):
    samples = [sample(str(i)) for i in range(5)]

    assert write_samples(tmp_path / "new" / "x.jsonl", samples) == 5
    assert list(read_samples(tmp_path / "new" / "x.jsonl")) == samples
    assert (tmp_path / "new" / "x.jsonl").read_bytes().count(b"\n") == 5


def test_crlf_and_blank_lines_are_read(tmp_path: Path):
    lines = [sample("1").to_json(), "", " ", sample("2").to_json()]
    (tmp_path / "x.jsonl").write_bytes("\r\n".join(lines).encode())

    assert [s.id for s in read_samples(tmp_path / "x.jsonl")] == ["1", "2"]


def test_the_first_bad_line_is_named_with_file_line_and_place(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text(sample("1").to_json() + "\n\n" + '{"id": "2", "conversations": [{}]}\n')
    samples = read_samples(path)

    assert next(samples).id == "1"
    expected = r"x\.jsonl:3: /source: Field required \(and 1 more\)"
    with pytest.raises(JsonlError, match=expected) as e:
        next(samples)
    assert (e.value.path, e.value.line_number) == (path, 3)


def test_a_byte_order_mark_is_named(tmp_path: Path):
    line = sample("1").to_json()
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "x.jsonl").write_text(line, encoding=encoding)
        with pytest.raises(JsonlError, match=r":1: .*byte order mark; save it as UTF-8"):
            list(read_samples(tmp_path / "x.jsonl"))


def test_a_missing_answer_is_an_error_unless_allowed(tmp_path: Path):
    write_samples(tmp_path / "x.jsonl", [sample("1", answer=None)])

    with pytest.raises(JsonlError, match="--allow_missing_answer"):
        list(read_samples(tmp_path / "x.jsonl"))
    assert len(list(read_samples(tmp_path / "x.jsonl", allow_missing_answer=True))) == 1


def test_a_failure_while_writing_leaves_the_old_file(tmp_path: Path):
    write_samples(tmp_path / "x.jsonl", [sample("old")])

    def failing() -> Iterator[Sample]:
        yield sample("new")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_samples(tmp_path / "x.jsonl", failing())
    assert [s.id for s in read_samples(tmp_path / "x.jsonl")] == ["old"]
    assert [file.name for file in tmp_path.iterdir()] == ["x.jsonl"]


def test_images_are_looked_for_beside_the_file(tmp_path: Path):
    assert default_image_root(tmp_path / "x.jsonl") == tmp_path
    (tmp_path / "images").mkdir()
    assert default_image_root(tmp_path / "x.jsonl") == tmp_path / "images"
