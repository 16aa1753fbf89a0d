import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from phi3v_train.cli import main
from phi3v_train.gallery import MOST_ANSWERS, choose_answers
from phi3v_train.report import write_report
from phi3v_train.run_folder import Evaluation, read_run

from tests.train.run_folders import (
    ATTACK,
    CLASSES,
    log_line,
    make_eval_shards,
    predictions,
    write_run,
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_eval_shards(tmp_path_factory.mktemp("val"), 9)


class Page(HTMLParser):
    """Tags and texts of a page, as a browser takes it apart."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def with_class(self, name: str) -> int:
        return sum(name in (attrs.get("class") or "").split() for _, attrs in self.tags)


def test_the_curve_of_the_score_has_what_was_measured_before_and_after_the_run(
    tmp_path: Path,
) -> None:
    answers = {"before": predictions(9, wrong=range(6)), "after": predictions(9)}
    lines = [log_line(step) for step in range(1, 101)]
    run = write_run(tmp_path / "run", lines=lines, evaluations=answers)
    (score,) = re.findall(
        r'src="data:image/svg\+xml;base64,([^"]*)" alt="score by step"',
        write_report(run).path.read_text(),
    )
    svg = base64.b64decode(score).decode()
    (line,) = re.findall(r' d="([^"]*)"[^>]*stroke: #4f46e5; stroke-width', svg)
    assert len(re.findall("[ML]", line)) == 2


def test_a_report_shows_how_far_the_run_is_and_what_it_reached(
    shards: Path, tmp_path: Path
) -> None:
    run = write_run(
        tmp_path / "first",
        shards=shards,
        lines=[log_line(step) for step in range(10, 61, 10)],
        history=[{"step": 20, "loss": 1.5}, {"step": 40, "loss": 1.25, "accuracy": 0.5}],
        evaluations={
            "before": predictions(9, wrong=range(6)),
            "after": predictions(9, wrong=[4]),
            "step-00000040": predictions(9, wrong=[4, 5]),
        },
        attempts=[
            {
                "started": "2026-01-31T12:00:00+01:00",
                "start_step": 0,
                "packages": {"torch": "2.11.0"},
            }
        ],
    )
    written = write_report(run)
    assert (written.path, written.notes) == (run / "report.html", ())
    page = Page(written.path)
    for part in ("60 of 100 steps", "33.3% → 88.9%", "1.2500", "41,000", "46.0%", "1m30s"):
        assert part in page.text, part
    for part in (
        "2026-01-31 11:00 UTC",
        "torch 2.11.0",
        "models/tiny",
        "after step 40",
        "accuracy 0.7778",
    ):
        assert part in page.text, part
    assert page.with_class("card") == 9
    assert (page.with_class("right"), page.with_class("wrong")) == (8, 1)
    pictures = [attrs["src"] or "" for tag, attrs in page.tags if tag == "img"]
    assert sum(src.startswith("data:image/webp;base64,") for src in pictures) == 18
    assert sum(src.startswith("data:image/svg+xml;base64,") for src in pictures) == 9
    assert "Which sport, 4?" in page.text
    for label in (*CLASSES, "something else"):
        assert label in page.text


def test_a_report_loads_nothing_and_runs_nothing(shards: Path, tmp_path: Path) -> None:
    run = write_run(
        tmp_path,
        shards=shards,
        lines=[log_line(10)],
        evaluations={"after": predictions(9)},
    )
    page = Page(write_report(run).path)
    for tag, attrs in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "a"), tag
        assert not [name for name in attrs if name.startswith("on") or name == "style"]
        for name in ("src", "srcset", "href"):
            assert (attrs.get(name) or "data:").startswith("data:")
    policy = next(attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv"))
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_html_in_data_stays_text(tmp_path: Path) -> None:
    attacked = [
        replace(p, id=ATTACK, prediction=ATTACK, answer=ATTACK, answers=(ATTACK,), correct=False)
        for p in predictions(4)
    ]
    write_run(
        tmp_path / "run",
        lines=[log_line(10)],
        history=[{"step": 10, ATTACK + " $": 0.5}],
        evaluations={"after": attacked, "before": predictions(4)},
        attempts=[{"started": ATTACK, "packages": {ATTACK: ATTACK}, "command": [ATTACK]}],
    )
    run = (tmp_path / "run").rename(tmp_path / "<img src=x onerror=alert(1)>")
    page = Page(write_report(run).path)
    assert {tag for tag, _ in page.tags} & {"script", "svg", "iframe"} == set()
    assert all((attrs.get("src") or "data:").startswith("data:") for _, attrs in page.tags)
    assert sum(tag == "style" for tag, _ in page.tags) == 1
    assert ATTACK in page.text


def test_the_same_run_gives_the_same_bytes(shards: Path, tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        shards=shards,
        lines=[log_line(step) for step in (10, 20)],
        evaluations={"after": predictions(9, wrong=[1])},
    )
    first = write_report(run).path.read_bytes()
    assert write_report(run, tmp_path / "again.html").path.read_bytes() == first


def test_a_run_that_has_only_begun_has_a_report(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    text = Page(write_report(run).path).text
    assert "no step is logged yet" in text
    assert "Curves" not in text
    assert "Answers" not in text


def test_pictures_that_are_gone_are_said_and_the_answers_stay(tmp_path: Path) -> None:
    run = write_run(tmp_path, shards=tmp_path / "gone", evaluations={"after": predictions(3)})
    written = write_report(run)
    (note,) = written.notes
    assert "data.eval cannot be read" in note
    page = Page(written.path)
    assert page.with_class("card") == 3
    assert "cannot be read" in page.text


def test_shards_that_hold_other_samples_now_are_said(shards: Path) -> None:
    others = [replace(p, id=f"other-{p.id}") for p in predictions(3)]
    items, problem = choose_answers(Evaluation("after", {}, tuple(others)), shards)
    assert "holds no sample 'other-val-0'" in problem
    assert [item.pictures for item in items] == [(), (), ()]


def test_answers_in_another_order_than_the_data_find_their_pictures(shards: Path) -> None:
    turned = tuple(reversed(predictions(9)))
    items, problem = choose_answers(Evaluation("after", {}, turned), shards)
    assert problem == ""
    assert [item.question for item in items] == [f"Which sport, {n}?" for n in range(8, -1, -1)]
    assert [len(item.pictures) for item in items] == [1 + n % 3 for n in range(8, -1, -1)]


def test_of_many_answers_the_wrong_ones_are_not_lost_among_the_right() -> None:
    many = Evaluation("after", {}, tuple(predictions(1000, wrong=range(0, 1000, 20))))
    items, _ = choose_answers(many, None)
    assert len(items) == MOST_ANSWERS
    assert sum(item.prediction.correct is False for item in items) == MOST_ANSWERS // 2
    few = Evaluation("after", {}, tuple(predictions(1000, wrong=[7])))
    assert [i.prediction.id for i in choose_answers(few, None)[0] if not i.prediction.correct] == [
        "val-7"
    ]


def test_a_log_that_is_still_being_written_is_read_up_to_its_last_whole_line(
    tmp_path: Path,
) -> None:
    run = write_run(tmp_path, lines=[log_line(10), log_line(20)])
    with open(run / "log.jsonl", "a") as file:
        file.write('{"step": 3')
    assert [line["step"] for line in read_run(run).lines] == [10, 20]
    with open(run / "log.jsonl", "a") as file:
        file.write(f"\n{log_line(40)}\n")
    with pytest.raises(ValueError, match=r"log\.jsonl:3: not a line of a log"):
        read_run(run)


def test_evaluations_come_in_the_order_of_their_steps(tmp_path: Path) -> None:
    names = ("after", "step-00000200", "before", "step-00001000")
    run = read_run(write_run(tmp_path, evaluations=dict.fromkeys(names, predictions(3))))
    assert [e.name for e in run.evaluations] == [
        "before",
        "step-00000200",
        "step-00001000",
        "after",
    ]


def test_a_folder_that_is_none_of_a_run_is_refused_in_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert result.exit_code == 1
    assert re.fullmatch(
        r"Error: \S+ is not the folder of a run: it has no config\.yaml; .*\n", result.output
    )


def test_the_command_writes_where_it_is_told(shards: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", shards=shards, lines=[log_line(10)])
    out = tmp_path / "shown" / "page.html"
    result = CliRunner().invoke(main, ["report", str(run), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"{out}: 0.")
    assert out.is_file()
