import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from phi3v_data import Sample, Turn, write_samples
from phi3v_data.cli import main
from phi3v_data.stats import (
    MAX_COUNTED_LABELS,
    MAX_NAMED,
    DistinctCount,
    Distribution,
    collect_stats,
    to_json,
)
from PIL import Image

from .peak_memory import run_measured

TORTURE = Path(__file__).resolve().parents[3] / "shared" / "testdata" / "json_parsing"


def sample(
    id: str, *images: str, user: str = "What?", answer: str | None = "a", turns: int = 1
) -> Sample:
    first = Turn(images=images, user=user, assistant=answer)
    more = tuple(Turn(user="and?", assistant="b") for _ in range(turns - 1))
    return Sample(id=id, source="toy", conversations=(*more, first))


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "a.jpg")
    Image.new("RGB", (20, 10)).save(tmp_path / "images" / "b.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["stats", *arguments])


def test_samples_turns_and_images_are_counted_by_file_and_in_all():
    write_samples("train.jsonl", [sample("1", "a.jpg", "b.png"), sample("2", "a.jpg", turns=3)])
    write_samples("val.jsonl", [sample("3", "a.jpg"), sample("4")])
    stats = collect_stats(["train.jsonl", "val.jsonl"])
    train, val = stats.files

    assert [train.num_samples, val.num_samples, stats.total.num_samples] == [2, 2, 4]
    assert [train.num_turns, val.num_turns, stats.total.num_turns] == [4, 2, 6]
    assert [train.num_images, val.num_images, stats.total.num_images] == [3, 1, 4]
    assert [s.images.count for s in (train, val, stats.total)] == [2, 1, 2]
    assert stats.total.images_per_sample.bins == {0: 1, 1: 2, 2: 1}
    assert stats.total.sources == {"toy": 4}


def test_each_distinct_image_has_one_size_and_format_whoever_uses_it():
    write_samples("train.jsonl", [sample("1", "a.jpg", "b.png"), sample("2", "a.jpg")])
    write_samples("val.jsonl", [sample("3", "a.jpg")])
    stats = collect_stats(["train.jsonl", "val.jsonl"])

    assert stats.total.sizes == {(40, 30): 1, (20, 10): 1}
    assert stats.total.formats == {"JPEG": 1, "PNG": 1}
    assert stats.files[1].sizes == {(40, 30): 1}
    assert stats.total.along(1).quantile(0.5) == 10


def test_images_that_cannot_be_looked_at_are_counted_by_reason(root: Path):
    (root / "secret.png").write_bytes((root / "images" / "b.png").read_bytes())
    (root / "images" / "link.png").symlink_to(root / "secret.png")
    (root / "images" / "text.png").write_text("no image")
    os.mkfifo(root / "images" / "pipe.png")  # opening it would wait for ever
    paths = ("../secret.png", "link.png", "text.png", "gone.png", "pipe.png", "b.png")
    write_samples("train.jsonl", [sample("1", *paths)])
    total = collect_stats(["train.jsonl"]).total

    assert total.problems == {"outside": 2, "missing": 2, "unreadable": 1}
    assert total.sizes == {(20, 10): 1}


def test_without_images_none_is_opened(root: Path):
    write_samples("train.jsonl", [sample("1", "a.jpg")])
    stats = collect_stats(["train.jsonl"], look_at_images=False)

    assert stats.total.images.count == 1
    assert not stats.total.image_facts
    assert json.loads(to_json(stats))["total"]["images"] is None


def test_lines_that_do_not_parse_are_counted_and_the_first_of_them_named(root: Path):
    write_samples("train.jsonl", [sample("1"), sample("2")])
    with open("train.jsonl", "ab") as file:
        file.write(b"\n" + b'{"id": 7}\n' * 30 + b"\xff\n")
    total = collect_stats(["train.jsonl"]).total

    assert (total.num_lines, total.num_samples, total.num_unparsed) == (33, 2, 31)
    assert len(total.unparsed) == MAX_NAMED
    assert total.unparsed[0][:2] == ("train.jsonl", 4)
    assert "`str`" in total.unparsed[0][2]


@pytest.mark.skipif(not TORTURE.is_dir(), reason="the parser torture files are not at hand")
def test_no_line_stops_the_count(root: Path):
    deep = b'{"id":"a","x":' + b"[" * 100_000 + b"\n"
    contents = [path.read_bytes().replace(b"\n", b" ") for path in sorted(TORTURE.glob("*.json"))]
    Path("train.jsonl").write_bytes(b"\n".join([*contents, deep, sample("1").to_json().encode()]))
    total = collect_stats(["train.jsonl"]).total

    assert total.num_samples == 1
    assert total.num_unparsed > 100


def test_few_answers_are_classes_and_many_are_not(root: Path):
    write_samples("few.jsonl", [sample(str(i), answer="yes" if i % 3 else "no") for i in range(9)])
    write_samples(
        "many.jsonl", [sample(str(i), answer=f"{i}") for i in range(MAX_COUNTED_LABELS + 1)]
    )
    few, many = collect_stats(["few.jsonl", "many.jsonl"]).files

    assert few.classes == {"yes": 6, "no": 3}
    assert many.classes is None
    assert many.answers.count == MAX_COUNTED_LABELS + 1
    assert collect_stats(["few.jsonl", "many.jsonl"]).total.classes is None


def test_answers_that_are_all_different_are_no_classes(root: Path):
    write_samples("open.jsonl", [sample(str(i), answer=f"answer {i}") for i in range(5)])
    assert collect_stats(["open.jsonl"]).total.classes is None


def test_turns_without_answer_are_counted(root: Path):
    write_samples("test.jsonl", [sample("1", answer=None), sample("2")])
    assert collect_stats(["test.jsonl"]).total.num_unanswered == 1


@given(st.lists(st.integers(0, 10**9), min_size=1), st.floats(0.01, 1))
def test_quantiles_are_a_thousandth_low_at_most(values: list[int], fraction: float):
    distribution = Distribution()
    for value in values:
        distribution.add(value)
    rank = next(i for i in range(len(values)) if i + 1 >= fraction * len(values))
    exact, found = sorted(values)[rank], distribution.quantile(fraction)

    assert found is not None
    assert exact * (1 - 1 / 512) <= found <= exact
    assert (distribution.minimum, distribution.maximum) == (min(values), max(values))
    assert distribution.mean == sum(values) / len(values)


def test_a_distribution_has_a_bounded_number_of_bins():
    distribution = Distribution()
    for value in range(0, 10_000_000, 37):
        distribution.add(value)
    assert len(distribution.bins) < 10_000


def hashes(numbers: Sequence[int]) -> list[int]:
    import xxhash

    return [xxhash.xxh3_64_intdigest(str(number).encode()) for number in numbers]


def counted(keys: Sequence[int], limit: int) -> DistinctCount:
    count = DistinctCount(limit)
    for key in keys:
        count.add(key)
    return count


def test_few_distinct_keys_are_counted_exactly():
    count = counted(hashes([*range(1000), *range(500)]), limit=1000)
    assert (count.count, count.is_exact) == (1000, True)


def test_many_distinct_keys_are_estimated_within_bounds_of_memory_and_error():
    count = counted(hashes([*range(100_000), *range(50_000)]), limit=4096)

    assert not count.is_exact
    assert len(count.kept) <= 4096
    assert count.count == pytest.approx(100_000, rel=0.05)


def test_what_is_kept_does_not_depend_on_the_order_nor_on_how_files_are_cut():
    keys = hashes(range(20_000))
    whole = counted(keys, limit=1024)
    joined = counted(keys[:15_000], limit=1024)
    joined.update(counted(keys[10_000:], limit=1024))

    assert counted(keys[::-1], limit=1024).kept == whole.kept
    assert joined.kept.keys() == whole.kept.keys()
    assert joined.count == whole.count


def test_json_has_the_documented_keys():
    write_samples("train.jsonl", [sample("1", "a.jpg"), sample("2", "b.png")])
    content = json.loads(run("train.jsonl", "--format", "json").stdout)
    total: dict[str, Any] = content["total"]

    assert set(content) == {"version", "files", "total"}
    assert content["version"] == 1
    assert content["files"][0]["file"] == "train.jsonl"
    assert total["file"] is None
    assert total["answers"] == {"a": 2}
    assert total["user_chars"]["p50"] == 5
    assert total["user_chars"]["counts"] == {"5": 2}
    assert total["images"]["formats"] == {"JPEG": 1, "PNG": 1}
    assert {"width": 20, "height": 10, "count": 1} in total["images"]["sizes"]
    help_text = run("--help").output
    assert all(key in help_text for key in total)
    assert all(key in help_text for key in total["user_chars"])


def test_the_table_shows_files_side_by_side_and_the_answers():
    write_samples("train.jsonl", [sample("1", "a.jpg"), sample("2", "b.png")])
    write_samples("val.jsonl", [sample("3", "a.jpg")])
    result = run("train.jsonl", "val.jsonl")
    words = [line.split() for line in result.output.splitlines()]

    assert result.exit_code == 0
    assert ["train.jsonl", "val.jsonl", "total"] in words
    assert ["samples", "2", "1", "3"] in words
    assert ["40", "x", "30", "1", "1", "1"] in words
    assert ["a", "2", "1", "3", "█" * 20] in words


def test_the_table_names_lines_left_out_and_still_exits_0():
    Path("train.jsonl").write_text(sample("1").to_json() + '\n{"id": "x"}\n')
    result = run("train.jsonl")

    assert result.exit_code == 0
    assert "train.jsonl:2: not counted: Object missing required field" in result.output
    assert "1 line left out: `phi3v-data validate` explains" in result.output


def test_answers_cannot_write_to_the_terminal_nor_be_markup():
    answers = ["[red]x[/]", "y\x1b[2J"]
    write_samples("train.jsonl", [sample(str(i), answer=answers[i % 2]) for i in range(4)])
    output = run("train.jsonl").output

    assert "[red]x[/]" in output
    assert "\x1b" not in output


def test_an_empty_file_has_stats_too():
    Path("none.jsonl").touch()
    assert run("none.jsonl").exit_code == 0
    assert json.loads(run("none.jsonl", "--format", "json").stdout)["total"]["num_samples"] == 0


def test_a_file_that_is_not_there_is_wrong_usage():
    assert run("gone.jsonl").exit_code == 2
    with pytest.raises(ValueError, match=r"gone\.jsonl: no such file"):
        collect_stats(["gone.jsonl"])
    with pytest.raises(ValueError, match="at least one"):
        collect_stats([])


@pytest.mark.slow
@pytest.mark.long
def test_a_million_lines_and_four_million_images_take_bounded_memory(root: Path):
    with open("big.jsonl", "w") as file:
        for i in range(1_000_000):
            images = ",".join(f'"train/{i}.{k}.jpg"' for k in range(4))
            file.write(
                f'{{"id":"{i}","source":"toy","conversations":[{{"images":[{images}],'
                f'"user":"What is it? {i}","assistant":"{i}"}}]}}\n'
            )
    script = """
        import sys
        from phi3v_data.stats import collect_stats
        total = collect_stats([sys.argv[1]]).total
        print(total.num_samples, total.images.count, total.answers.count, peak_mb())
    """
    samples, images, answers, peak = run_measured(script, root / "big.jsonl").split()

    assert int(samples) == 1_000_000
    assert int(images) == pytest.approx(4_000_000, rel=0.02)
    assert int(answers) == pytest.approx(1_000_000, rel=0.02)
    assert float(peak) < 250
