"""The report of a run: one HTML page that needs nothing else, runs no script and asks no network.

    written = write_report("runs/first")          # runs/first/report.html
    written.path, written.num_bytes, written.notes

What is on it: how far the run is and what it reached; curves of loss, score, rates and memory;
every evaluation; a gallery of answers, right and wrong, with their pictures; the confusion matrix
of a classification; every setting and where it ran. `report.html` beside this module is the page
without data. It can be made while the run is going on, and again at any time.

Safe: whatever comes from data or files is escaped where it enters the page, and the page's
Content-Security-Policy allows no script at all. Pictures are drawn anew, as WebP or SVG.
"""

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from phi3v_data.atomic import write_atomic

from phi3v_train.confusion import Confusion, confusion, is_classification
from phi3v_train.curves import draw_curves
from phi3v_train.gallery import GalleryItem, choose_answers
from phi3v_train.metrics import count_by_class
from phi3v_train.predictions import Prediction
from phi3v_train.run_folder import Evaluation, Run, read_run
from phi3v_train.throughput import as_duration

REPORT = "report.html"
"""Name below the run's folder."""

ABSENT = "\N{EN DASH}"

MOST_CHARACTERS = 600
"""Of a text on a card."""

MOST_CLASSES = 120
"""Of a confusion matrix that is shown."""


@dataclass(frozen=True, slots=True)
class WrittenReport:
    """What was written."""

    path: Path
    num_bytes: int
    notes: tuple[str, ...]
    """What is missing on the page, and why; a sentence each."""


def write_report(folder: str | Path, out: str | Path | None = None) -> WrittenReport:
    """Write the report of a run.

    Args:
        folder: of the run, finished or not.
        out: the HTML file; by default `report.html` in the folder. It appears when complete.

    Raises:
        ValueError: the folder is none of a run, or a file in it was changed into something else.
    """
    run = read_run(folder)
    path = Path(out) if out is not None else run.folder / REPORT
    notes: list[str] = []
    body = "\n".join(
        [
            _head(run),
            _tiles(run),
            *_curves(run),
            *_evaluations(run),
            *_gallery(run, notes),
            *_matrix(run),
            _setup(run),
        ]
    )
    page = _page(f"{run.folder.resolve().name}: phi3v-train", body).encode("utf-8", "replace")
    write_atomic(path, page)
    return WrittenReport(path, len(page), tuple(notes))


def _page(title: str, body: str) -> str:
    html = package_files("phi3v_train").joinpath("report.html").read_text(encoding="utf-8")
    (style,) = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'"
    )
    places = {"policy": policy, "title": escape(title), "body": body}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: places[match[1]], html)


# --- how it went ----------------------------------------------------------------------------------


def _head(run: Run) -> str:
    if run.num_steps is None:
        state = "no step is logged yet"
    elif run.step >= run.num_steps:
        state = f"finished: {run.step:,} steps"
    else:
        state = f"{run.step:,} of {run.num_steps:,} steps"
    method = run.config.get("method")
    name = str(method.get("name", "")) if isinstance(method, Mapping) else ""
    words = [state, name, f"from {run.config.get('model', '?')}"]
    if run.attempts:
        words.append(f"begun {_moment(run.attempts[0])}")
        if len(run.attempts) > 1:
            words.append(f"{len(run.attempts)} attempts")
    shown = " · ".join(escape(word) for word in words if word)
    return f'<h1>{escape(run.folder.resolve().name)}</h1>\n<p class="state">{shown}</p>'


def _moment(attempt: Mapping[str, Any]) -> str:
    """`2026-01-31 12:00 UTC`; what is no time as it is."""
    text = str(attempt.get("started", "?"))
    try:
        return datetime.fromisoformat(text).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return text


def _tiles(run: Run) -> str:
    tiles: list[tuple[str, str]] = []
    if run.lines:
        last = run.lines[-1]
        tiles.append(("last training loss", _number(last.get("loss"), ".4f")))
        losses = [point["loss"] for point in run.history if "loss" in point]
        if losses:
            tiles.append(("best evaluation loss", _number(min(losses), ".4f")))
    scored = [(e, *_score(e)) for e in run.evaluations]
    if scored:
        first, (last_one, metric, score) = scored[0], scored[-1]
        shown = _number(score, ".1%")
        if first[0] is not last_one and first[1] == metric:
            shown = f"{_number(first[2], '.1%')} → {shown}"
        tiles.append((metric, shown))
    if run.lines:
        for key, title, form in (
            ("tokens_per_second", "tokens a second, median", ",.0f"),
            ("images_per_second", "images a second, median", ",.1f"),
            ("mfu", "MFU, median", ".1%"),
            ("data_wait", "of the time waiting for data, median", ".1%"),
        ):
            value = _median(line.get(key) for line in run.lines)
            if value is not None:
                tiles.append((title, format(value, form)))
        memory = [line["memory_gib"] for line in run.lines if line.get("memory_gib") is not None]
        if memory:
            tiles.append(("peak memory", f"{max(memory):.1f} GiB"))
        tiles.append(("of training, last attempt", as_duration(float(run.lines[-1]["seconds"]))))
    cells = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(title)}</span></div>'
        for title, value in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _score(evaluation: Evaluation) -> tuple[str, float | None]:
    """(metric, score) of an evaluation."""
    metric = str(evaluation.summary.get("metric", "accuracy"))
    score = evaluation.summary.get(metric, evaluation.summary.get("score"))
    return metric, score if isinstance(score, int | float) else None


def _median(values: Iterable[Any]) -> float | None:
    known = sorted(float(value) for value in values if isinstance(value, int | float))
    return known[len(known) // 2] if known else None


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else ABSENT


def _curves(run: Run) -> list[str]:
    curves = draw_curves(run.lines, _measured(run))
    if not curves:
        return []
    figures = "".join(
        f'<figure class="curve"><figcaption>{escape(curve.title)}</figcaption><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{_svg_url(curve.dark)}">'
        f'<img src="{_svg_url(curve.light)}" alt="{escape(curve.title)} by step">'
        "</picture></figure>"
        for curve in curves
    )
    return [f'<h2>Curves</h2><div class="curves">{figures}</div>']


def _measured(run: Run) -> list[dict[str, Any]]:
    """The history, and the scores before and after the run, by step."""
    points = {point["step"]: dict(point) for point in run.history}
    for evaluation in run.evaluations:
        metric, score = _score(evaluation)
        step = evaluation.step if evaluation.step is not None else run.step
        if score is not None:
            points.setdefault(step, {"step": step}).setdefault(metric, score)
    return [points[step] for step in sorted(points)]


def _svg_url(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


# --- what it answers ------------------------------------------------------------------------------


def _evaluations(run: Run) -> list[str]:
    measured = {point["step"]: point for point in run.history}
    rows: list[tuple[str, ...]] = []
    for evaluation in run.evaluations:
        metric, score = _score(evaluation)
        step = evaluation.step if evaluation.step is not None else run.step
        right = sum(p.correct is True for p in evaluation.predictions)
        rows.append(
            (
                _when(evaluation),
                f"{metric} {_number(score, '.4f')}",
                _number(measured.get(step, {}).get("loss"), ".4f"),
                f"{right:,}",
                f"{len(evaluation.predictions):,}",
            )
        )
    if not rows:
        return []
    titles = ("evaluation", "score", "loss", "right", "of")
    return [f'<h2>Evaluations</h2><div class="panel">{_table(titles, rows)}</div>']


def _when(evaluation: Evaluation) -> str:
    """`before training`, `after step 20`, `after training`."""
    if evaluation.step:
        return f"after step {evaluation.step:,}"
    known = {"before": "before training", "after": "after training"}
    return known.get(evaluation.name, evaluation.name)


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    lines = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<table class="plain"><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>'


def _gallery(run: Run, notes: list[str]) -> list[str]:
    if not run.evaluations:
        return []
    last = run.evaluations[-1]
    before = run.evaluations[0] if run.evaluations[0] is not last else None
    data = run.config.get("data")
    shards = data.get("eval") if isinstance(data, Mapping) else None
    items, problem = choose_answers(last, None if shards is None else str(shards), before)
    parts = [f"<h2>Answers {escape(_when(last))}</h2>"]
    if problem:
        notes.append(f"no pictures: {problem}")
        parts.append(f'<p class="note">No pictures: {escape(problem)}</p>')
    total = len(last.predictions)
    right = sum(p.correct is True for p in last.predictions)
    wrong = sum(p.correct is False for p in last.predictions)
    kinds = (("all", total), ("right", right), ("wrong", wrong))
    choices = "".join(
        f'<input class="choice" type="radio" name="show" id="show-{kind}"'
        f"{' checked' if kind == 'all' else ''}>"
        for kind, _ in kinds
    )
    labels = "".join(f'<label for="show-{kind}">{kind} {count:,}</label>' for kind, count in kinds)
    shown = f"{len(items):,} of {total:,} shown" if len(items) < total else ""
    cards = "".join(map(_card, items))
    parts.append(
        f'<div class="answers">{choices}<div class="filters">{labels}</div>'
        f'<p class="state">{shown}</p><div class="cards">{cards}</div></div>'
    )
    return parts


def _card(item: GalleryItem) -> str:
    prediction = item.prediction
    kind = {True: "right", False: "wrong", None: "unknown"}[prediction.correct]
    words = [f'<p class="question">{_words(item.question)}</p>'] if item.question else []
    mark = {"right": "✓", "wrong": "✗", "unknown": "?"}[kind]
    words.append(
        f'<p class="said" data-mark="{mark}">{_words(prediction.prediction) or ABSENT}</p>'
    )
    if kind != "right":
        words += [f"<p><small>expected</small> {_words(a)}</p>" for a in _expected(prediction)]
    if prediction.score is not None and prediction.score not in (0, 1):
        words.append(f"<p><small>score {prediction.score:.2f}</small></p>")
    if item.before is not None and item.before != prediction.prediction:
        words.append(f"<p><small>before: {_words(item.before)}</small></p>")
    place = prediction.id if prediction.turn == 1 else f"{prediction.id}, turn {prediction.turn}"
    words.append(f'<p class="id">{_words(place)}</p>')
    return (
        f'<article class="card {kind}">{_pictures(item)}'
        f'<div class="words">{"".join(words)}</div></article>'
    )


def _expected(prediction: Prediction) -> tuple[str, ...]:
    answers = prediction.answers or ((prediction.answer,) if prediction.answer is not None else ())
    return answers[:3]


def _pictures(item: GalleryItem) -> str:
    if not item.pictures:
        return ""
    cells = "".join(
        f'<img src="data:image/webp;base64,{base64.b64encode(picture.data).decode()}" alt="">'
        if picture.data
        else f'<div class="hole">{escape(picture.problem)}</div>'
        for picture in item.pictures
    )
    count = len(item.pictures)
    size = "one" if count == 1 else "two" if count == 2 else "many"
    left = item.num_images - count
    more = f'<div class="hole">and {left:,} more images</div>' if left else ""
    return f'<div class="pictures {size}">{cells}</div>{more}'


def _words(text: str) -> str:
    """A text as HTML, cut where it is long."""
    if len(text) > MOST_CHARACTERS:
        left = len(text) - MOST_CHARACTERS
        text = f"{text[:MOST_CHARACTERS]}… [{left:,} more characters]"
    return escape("".join(c if c.isprintable() or c in "\n\t" else "�" for c in text))


def _matrix(run: Run) -> list[str]:
    if not run.evaluations:
        return []
    last = run.evaluations[-1]
    known = [p for p in last.predictions if p.answer is not None]
    if not known:
        return []
    by_class = count_by_class([p.prediction for p in known], [p.answer or "" for p in known])
    if not is_classification(by_class) or len(by_class) < 2:
        return []
    matrix = confusion(by_class)
    parts = [f"<h2>Confusion matrix {escape(_when(last))}</h2>"]
    if len(matrix.labels) <= MOST_CLASSES:
        parts.append(f'<div class="panel">{_matrix_table(matrix)}</div>')
    rows = [
        (_label(said), _label(truth), f"{count:,}")
        for count, truth, said in _taken_for_another(matrix)[:12]
    ]
    if rows:
        parts.append(
            "<details open><summary>Most often taken for another</summary>"
            f'<div class="panel">{_table(("said", "instead of", "times"), rows)}</div></details>'
        )
    return parts


def _taken_for_another(matrix: Confusion) -> list[tuple[int, str, str]]:
    """(how often, truth, said), the most frequent first."""
    pairs = [
        (count, truth, said)
        for truth, row in zip(matrix.labels, matrix.counts, strict=True)
        for said, count in zip(matrix.labels, row, strict=True)
        if count and truth != said
    ]
    pairs += [
        (count, truth, "(something else)")
        for truth, count in zip(matrix.labels, matrix.other, strict=True)
        if count
    ]
    return sorted(pairs, key=lambda pair: (-pair[0], pair[1], pair[2]))


def _matrix_table(matrix: Confusion) -> str:
    has_other = any(matrix.other)
    names = [*matrix.labels, *(["something else"] if has_other else [])]
    head = "".join(f"<th>{escape(_label(name))}</th>" for name in names)
    lines: list[str] = []
    for number, (label, row) in enumerate(zip(matrix.labels, matrix.counts, strict=True)):
        counts = [*row, *([matrix.other[number]] if has_other else [])]
        total = sum(row) + matrix.other[number]
        cells = "".join(
            _cell(count, total, is_diagonal=column == number) for column, count in enumerate(counts)
        )
        lines.append(f"<tr><th>{escape(_label(label))}</th>{cells}</tr>")
    return (
        '<p class="state">Rows: what is true. Columns: what was said.</p>'
        f'<table class="matrix"><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table>"
    )


def _cell(count: int, total: int, *, is_diagonal: bool) -> str:
    shade = 0 if not count else min(5, 1 + int(5 * count / total))
    kind = ("d " if is_diagonal else "") + f"s{shade}"
    return f'<td class="{kind}">{count or ""}</td>'


def _label(text: str) -> str:
    return text if len(text) <= 40 else text[:39] + "…"


# --- what it was ----------------------------------------------------------------------------------


def _setup(run: Run) -> str:
    parts = ["<h2>Set-up</h2>"]
    for number, attempt in enumerate(run.attempts, start=1):
        rows = [
            ("started", _moment(attempt)),
            ("from step", str(attempt.get("start_step", ""))),
            ("devices", _gpus(attempt)),
            ("processes", str(attempt.get("processes", ""))),
            ("python", str(attempt.get("python", ""))),
            ("platform", str(attempt.get("platform", ""))),
            ("packages", _pairs(attempt.get("packages"))),
            ("variables", _pairs(attempt.get("variables"))),
            ("command", " ".join(map(str, attempt.get("command") or ()))),
        ]
        table = _table(("attempt", str(number)), [row for row in rows if row[1]])
        parts.append(f'<div class="panel">{table}</div>')
    parts.append(
        "<details><summary>Every setting</summary>"
        f'<div class="panel"><pre>{escape(run.config_text)}</pre></div></details>'
    )
    parts.append("<footer>Written by phi3v-train.</footer>")
    return "\n".join(parts)


def _gpus(attempt: Mapping[str, Any]) -> str:
    names = [str(gpu.get("name", "?")) for gpu in attempt.get("gpus") or ()]
    counted = [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    return ", ".join(counted) or f"CPU, {attempt.get('cores', '?')} cores"


def _pairs(values: Any) -> str:
    if not isinstance(values, Mapping):
        return ""
    return ", ".join(f"{name} {value}" for name, value in values.items())
