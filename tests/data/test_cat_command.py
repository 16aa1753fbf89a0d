"""`phi3v-data cat`: a sample of a shard directory, in the terminal."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from phi3v_data import Sample, Turn, write_samples, write_shards
from phi3v_data.cli import main
from PIL import Image


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "images" / "train").mkdir(parents=True)
    for name, size in (("a.png", (60, 40)), ("b.png", (50, 30))):
        Image.effect_noise(size, 99).save(tmp_path / "images" / "train" / name)
    samples = [
        Sample(
            id="first",
            source="toy",
            conversations=(
                Turn(images=("train/a.png", "train/b.png"), user="Which?", assistant="A"),
                Turn(user="And \x1b[31mnow?", assistant="B", answers=("B", "b")),
            ),
            metadata={"page": 4},
        ),
        Sample(id="0", source="toy", conversations=(Turn(user="u", assistant="a"),)),
        Sample(id="last", source="toy", conversations=(Turn(user="v", assistant="a"),)),
    ]
    write_samples(tmp_path / "train.jsonl", samples)
    write_shards([tmp_path / "train.jsonl"], tmp_path / "shards")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ("cat", "shards", *arguments))


def test_a_sample_is_shown_with_conversation_images_and_metadata():
    result = run("0")

    assert result.exit_code == 0
    assert "shards 0: first (toy)" in result.output
    assert "60x40" in result.output
    assert "train/b.png" in result.output
    assert result.output.index("Which?") < result.output.index("And \\x1b[31mnow?")
    assert "page: 4" in result.output
    assert "\x1b" not in result.output
    assert "shard-00000.parquet" in result.output


@pytest.mark.parametrize(
    ("arguments", "id"),
    [(["last"], "last"), (["-1"], "last"), (["1"], "0"), (["--id", "0"], "0"), (["2"], "last")],
)
def test_a_sample_is_named_by_number_or_id(arguments: list[str], id: str):
    assert json.loads(run(*arguments, "--json").output)["sample"]["id"] == id


def test_json_is_one_object_a_line_with_the_sizes_of_images(root: Path):
    lines = [json.loads(line) for line in run("0", "1", "--json").output.splitlines()]
    num_bytes = (root / "images" / "train" / "a.png").stat().st_size

    assert [line["row"] for line in lines] == [0, 1]
    assert lines[0]["images"][0] == {
        "path": "train/a.png",
        "width": 60,
        "height": 40,
        "num_bytes": num_bytes,
    }


def test_images_are_written_as_they_were_stored_and_never_over_others(root: Path):
    result = run("0", "--images", "out")

    assert "wrote out/02-b.png" in result.output
    for number, name in ((1, "a.png"), (2, "b.png")):
        written = (root / "out" / f"{number:02d}-{name}").read_bytes()
        assert written == (root / "images" / "train" / name).read_bytes()
    assert run("0", "--images", "out").exit_code == 0
    (root / "out" / "01-a.png").write_text("mine")
    refused = run("0", "--images", "out")
    assert refused.exit_code == 2
    assert "out/01-a.png: is there already and is another image" in refused.stderr
    assert (root / "out" / "01-a.png").read_text() == "mine"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("3", "shards has no sample 3: expected 0 to 2, or -1 for the last; --id takes it as an"),
        ("-4", "shards has no sample -4"),
        ("frist", "no sample of id 'frist' among 3; did you mean 'first'?"),
    ],
)
def test_a_sample_that_is_not_there_exits_2_and_says_what_is(argument: str, message: str):
    result = run(argument)

    assert result.exit_code == 2
    assert message in result.stderr


def test_a_folder_that_is_no_shard_directory_exits_1():
    result = CliRunner().invoke(main, ("cat", "images", "0"))

    assert result.exit_code == 1
    assert "Traceback" not in result.output
