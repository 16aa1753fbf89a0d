import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from phi3v_data import Sample, Turn, open_shards, write_samples
from phi3v_data.cli import main
from PIL import Image


def sample(id: str, *images: str, answer: str = "a") -> Sample:
    turns = (Turn(images=images, user=f"u{id}", assistant=answer),)
    return Sample(id=id, source="toy", conversations=turns)


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "images").mkdir()
    Image.effect_noise((60, 60), 99).save(tmp_path / "images" / "a.png")
    write_samples(tmp_path / "good.jsonl", [sample("1", "a.png"), sample("2", "a.png")])
    write_samples(tmp_path / "bad.jsonl", [sample("1", "a.png"), sample("2", answer=" ")])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.mark.parametrize("option", ["--out_dir", "--out-dir"])
def test_shard_writes_a_directory_and_says_what_is_in_it(option: str):
    result = run("shard", "good.jsonl", option, "shards/train")

    assert result.exit_code == 0
    assert result.output.startswith("2 samples, 2 images (")
    assert result.output.endswith(f" in 1 shard ({kib('shards/train'):.1f} KiB): shards/train\n")
    assert len(open_shards("shards/train")) == 2


def kib(directory: str) -> float:
    return Path(directory, "shard-00000.parquet").stat().st_size / 1024


def test_the_same_again_is_up_to_date():
    run("shard", "good.jsonl", "--out_dir", "out")
    result = run("shard", "good.jsonl", "--out_dir", "out")

    assert result.exit_code == 0
    assert result.output.startswith("out is up to date: same input, same settings\n2 samples")


def test_something_else_is_refused_without_overwrite(root: Path):
    run("shard", "good.jsonl", "--out_dir", "out")
    write_samples(root / "good.jsonl", [sample("3", "a.png")])
    refused = run("shard", "good.jsonl", "--out_dir", "out")

    assert refused.exit_code == 2
    assert "written from other conversations files; --overwrite replaces it" in refused.stderr
    assert run("shard", "good.jsonl", "--out_dir", "out", "--overwrite").exit_code == 0
    assert open_shards("out").sample(0).id == "3"


def test_an_error_exits_1_with_the_report_and_writes_nothing(root: Path):
    result = run("shard", "bad.jsonl", "--out_dir", "out")

    assert result.exit_code == 1
    assert "bad.jsonl:2:80: error T101" in result.stdout
    assert "Nothing was written: repair them, or leave them out with --drop_invalid" in (
        result.stderr
    )
    assert sorted(os.listdir(root)) == ["bad.jsonl", "good.jsonl", "images"]


def test_drop_invalid_writes_the_rest_and_lists_what_was_dropped():
    result = run("shard", "bad.jsonl", "--out_dir", "out", "--drop_invalid")
    rejected = [json.loads(line) for line in open("out/rejected.jsonl")]

    assert result.exit_code == 0
    assert "1 dropped, listed in out/rejected.jsonl" in result.output
    assert rejected[0]["findings"][0]["code"] == "T101"
    assert len(open_shards("out")) == 1


def test_shard_size_begins_new_files():
    run("shard", "good.jsonl", "--out_dir", "out", "--shard_size", "3kB")

    assert len(list(Path("out").glob("*.parquet"))) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["good.jsonl"], "Missing option '--out_dir'"),
        (["nope.jsonl", "--out_dir", "out"], "'nope.jsonl' does not exist"),
        (["good.jsonl", "--out_dir", "out", "--shard_size", "12 apples"], "such as 128MiB"),
        (["good.jsonl", "--out_dir", "out", "--shard_size", "0"], "such as 128MiB"),
        (["good.jsonl", "--out_dir", "images"], "holds files that are not shards (a.png"),
        (["good.jsonl", "--out_dir", "good.jsonl"], "is a file"),
        (["empty.jsonl", "--out_dir", "out"], "no samples"),
    ],
)
def test_wrong_usage_exits_2_with_one_line_and_writes_nothing(
    root: Path, arguments: list[str], message: str
):
    (root / "empty.jsonl").touch()
    before = sorted(os.listdir(root))
    result = run("shard", *arguments)

    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")
    assert sorted(os.listdir(root)) == before


def test_the_number_of_crops_decides_what_gets_in_and_is_recorded(root: Path):
    Image.new("RGB", (3000, 2)).save(root / "images" / "long.png")
    write_samples(root / "long.jsonl", [sample("1", "long.png")])

    refused = run("shard", "long.jsonl", "--out_dir", "four", "--num_crops", "4")
    assert refused.exit_code == 1
    assert "I105" in refused.output
    assert "short side becomes 0 pixels at num_crops 4" in refused.output.replace("\n", " ")
    assert not os.path.exists("four")
    assert run("shard", "long.jsonl", "--out_dir", "five", "--num_crops", "5").exit_code == 0
    manifest = open_shards("five").manifest
    assert manifest.settings.num_crops == 5
    assert "I105" in manifest.validation.rules


def test_verify_says_that_all_is_well():
    run("shard", "good.jsonl", "--out_dir", "out")
    result = run("verify", "out")

    assert result.exit_code == 0
    assert result.output == "out: 2 samples, 2 images in 1 shard, all as written\n"


def test_verify_names_what_is_damaged(root: Path):
    run("shard", "good.jsonl", "--out_dir", "out")
    path = root / "out" / "shard-00000.parquet"
    content = bytearray(path.read_bytes())
    content[content.index((root / "images" / "a.png").read_bytes()) + 99] ^= 1
    path.write_bytes(content)
    result = run("verify", "out")

    assert result.exit_code == 1
    assert "out/shard-00000.parquet: damaged: its SHA-256" in result.output
    assert "row 0, sample '1', image 1 (a.png): its bytes are damaged" in result.output
    assert "2 problems: write it again" in result.output


def test_verify_says_what_is_no_shard_directory():
    result = run("verify", "images")

    assert result.exit_code == 1
    assert "images: has no manifest.json; expected a directory written by" in result.stderr
    assert run("verify", "nowhere").exit_code == 2


def test_shard_follows_the_settings_of_validate(root: Path):
    """Of pyproject.toml, per-file ignores among them, and of the command line."""
    (root / "pyproject.toml").write_text(
        "[tool.phi3v-data.validate]\nseverity = {T101 = 'warning'}\n"
        "per-file-ignores = {'good*' = ['D102']}\n"
    )
    result = run("shard", "good.jsonl", "bad.jsonl", "--out_dir", "out", "--ignore", "D101")
    manifest = open_shards("out").manifest

    assert result.exit_code == 0
    assert "warning T101" in result.output
    assert manifest.validation.severities["T101"] == "warning"
    assert "D101" not in manifest.validation.rules
    assert [source.ignored for source in manifest.sources] == [("D102",), ()]
    stricter = run("shard", "bad.jsonl", "--out_dir", "other", "--severity", "T101=error")
    assert stricter.exit_code == 1


def test_max_errors_stops_and_writes_nothing(root: Path):
    write_samples(root / "bad.jsonl", [sample(str(i), answer=" ") for i in range(9)])
    result = run("shard", "bad.jsonl", "--out_dir", "out", "--max_errors", "2")

    assert result.exit_code == 1
    assert "Nothing was written: it stopped at so many errors (max_errors)" in result.stderr
    assert not os.path.exists("out")


def test_verify_takes_several_directories_and_says_how_much_it_read():
    run("shard", "good.jsonl", "--out_dir", "out/one")
    run("shard", "good.jsonl", "--out_dir", "out/two")
    Path("out/two/more.txt").touch()
    result = run("verify", "out/one", "out/two", "--sample", "1", "--json")
    one, two = json.loads(result.output)["directories"]

    assert result.exit_code == 1
    assert (one["num_samples"], one["num_read"], one["findings"]) == (2, 1, [])
    assert two["findings"] == [{"file": "more.txt", "problem": "not in the manifest"}]
    assert "(1 read back)" in run("verify", "out/one", "--sample", "1").output


def test_convert_writes_each_split_as_shards_where_asked(root: Path):
    (root / "toy_converter.py").write_text(CONVERTER)
    write_raw(root)
    result = run("convert", "toy_converter:Toy", "raw", "--out_dir", "converted", *SHARDS)

    assert result.exit_code == 0, result.output
    assert sorted(os.listdir("converted/shards")) == ["test", "train"]
    assert [record.sample.id for record in open_shards("converted/shards/train")] == ["t0", "t1"]
    assert open_shards("converted/shards/test").sample(0).conversations[0].assistant is None
    again = run("convert", "toy_converter:Toy", "raw", "--out_dir", "converted", *SHARDS)
    assert "converted/shards/train is up to date" in again.output


def test_convert_says_which_split_could_not_be_written_and_how_it_could(root: Path):
    (root / "toy_converter2.py").write_text(CONVERTER.replace('"an answer"', '" "'))
    write_raw(root)
    result = run("convert", "toy_converter2:Toy", "raw", "--out_dir", "converted", *SHARDS)

    assert result.exit_code == 1
    assert "error T101" in result.output
    assert "--out_dir converted/shards/train --drop_invalid" in result.stderr
    assert os.listdir("converted/shards") == ["test"]


def write_raw(root: Path) -> None:
    for split in ("train", "test"):
        (root / "raw").mkdir(exist_ok=True)
        (root / "raw" / f"{split}.txt").write_text(split)


SHARDS = ("--shards", "--workers", "0")

CONVERTER = '''
from pathlib import Path

from phi3v_data import Item, Sample, Turn


class Toy:
    """Toy questions."""

    name = "toy"

    def discover(self, source):
        for index, split in enumerate(("train", "test")):
            path = Path(source, f"{split}.txt")
            yield Item(index, key=path.name, path=str(path), split=split)

    def convert(self, item, out_dir):
        for i in range(2):
            answer = "an answer" if item.split == "train" else None
            turn = Turn(user=f"{item.split} {i}?", assistant=answer)
            yield Sample(id=f"t{i}", source="toy", conversations=(turn,))
'''
