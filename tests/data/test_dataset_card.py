import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from phi3v_data.convert import convert
from phi3v_data.converters import About, Item, Rejected, list_converters, load_converter
from phi3v_data.schema import Sample, Turn


class Answers:
    """Lines of a file as answers; empty ones are rejected."""

    name = "answers"
    about: ClassVar[About] = About("The | Answers", "https://example.org", "Free to use.")

    def discover(self, source: Path) -> Iterator[Item]:
        for index, path in enumerate(sorted(source.glob("*.txt"))):
            yield Item(index, path.name, str(path), split=path.stem)

    def convert(self, item: Item, out_dir: Path) -> Iterator[Sample | Rejected]:
        for number, line in enumerate(Path(item.path).read_text().split("\n")):
            if not line:
                yield Rejected("empty", f"line {number}")
                continue
            answer = None if line == "?" else line
            turn = Turn(user="?", assistant=answer)
            yield Sample(id=f"{item.split}-{number}", source=self.name, conversations=(turn,))


def card_of(folder: Path, converter: object = None, **texts: str) -> str:
    (folder / "src").mkdir(parents=True)
    for name, text in texts.items():
        (folder / f"src/{name}.txt").write_text(text)
    found = converter or Answers()
    convert(found, folder / "src", folder / "out", num_workers=0)  # pyright: ignore[reportArgumentType]
    return (folder / "out/dataset_card.md").read_text()


def test_the_card_has_splits_labels_rejections_source_and_licence(tmp_path: Path) -> None:
    card = card_of(tmp_path, train="yes\nno\nyes\n", val="no\nyes")
    assert 'pretty_name: "The | Answers"' in card
    assert "      - split: train\n        path: answers_train.jsonl" in card
    assert "| train | `answers_train.jsonl` | 3 | 3 | 0 |" in card
    assert "| answer | train | val |\n| --- | --- | --- |\n| yes | 2 | 1 |\n| no | 1 | 1 |" in card
    assert "| empty | 1 |" in card
    digest = hashlib.sha256(b"yes\nno\nyes\n").hexdigest()
    assert f"| train.txt | 11 | `{digest}` |" in card
    assert "Free to use." in card
    assert "https://example.org" in card
    assert str(tmp_path) not in card


def test_the_header_is_yaml_that_the_hub_reads(tmp_path: Path) -> None:
    card = card_of(tmp_path, train="a\nb")
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["pretty_name"] == "The | Answers"
    (config,) = header["configs"]
    assert config["data_files"] == [{"split": "train", "path": "answers_train.jsonl"}]


def test_free_answers_are_not_taken_for_labels(tmp_path: Path) -> None:
    card = card_of(tmp_path, train="\n".join(f"answer {n}" for n in range(300)))
    assert "Label balance" not in card


def test_many_labels_are_summed_up(tmp_path: Path) -> None:
    card = card_of(tmp_path, train="\n".join(f"class {n % 50:02}" for n in range(200)))
    assert "50 different answers." in card
    assert "| class 29 | 4 |\n| 20 others | 80 |" in card


def test_what_lacks_an_answer_is_counted(tmp_path: Path) -> None:
    card = card_of(tmp_path, train="a\n?", test="?")
    assert "| train | `answers_train.jsonl` | 2 | 2 | 0 | 1 |" in card


def test_an_answer_cannot_break_the_table(tmp_path: Path) -> None:
    card = card_of(tmp_path, train="a|b`<x>\na|b`<x>")
    assert "| a\\|b\\`&lt;x> | 2 |" in card


def test_a_converter_that_says_nothing_of_its_source_leaves_the_licence_open(
    tmp_path: Path,
) -> None:
    class Plain:
        name = "plain"
        discover = Answers.discover
        convert = Answers.convert

    card = card_of(tmp_path, Plain(), train="a")
    assert "# plain, as conversations" in card
    assert "nothing here says which" in card


@pytest.mark.parametrize("name", ["docvqa", "hateful_memes", "nlvr2", "ucf101"])
def test_the_data_sets_say_where_they_are_from_and_what_may_be_done(name: str) -> None:
    assert name in list_converters()
    about = vars(load_converter(name)).get("about")
    assert isinstance(about, About)
    assert about.homepage.startswith("https://")
    assert len(about.license) > 20
