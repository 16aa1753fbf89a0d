import re
from xml.etree import ElementTree

import pytest
from phi3v_train.curves import MOST_POINTS, draw_curves

from tests.train.run_folders import log_line


def test_a_picture_is_drawn_of_what_there_is() -> None:
    lines = [log_line(step, mfu=None) for step in range(1, 5)]
    titles = [curve.title for curve in draw_curves(lines, [])]
    assert "loss per label token" in titles
    assert "score" not in titles
    history = [{"step": 2, "accuracy": 0.5, "loss": 1.0}]
    assert "score" in [curve.title for curve in draw_curves(lines, history)]
    assert draw_curves([], []) == []


def test_numbers_that_are_none_are_left_out() -> None:
    lines = [log_line(1, grad_norm=None), log_line(2, grad_norm=None, loss=None)]
    titles = [curve.title for curve in draw_curves(lines, [])]
    assert "gradient norm before clipping" not in titles
    assert "loss per label token" in titles


def test_pictures_are_svg_with_text_and_the_same_for_the_same_numbers() -> None:
    lines = [log_line(step) for step in range(1, 60)]
    history = [{"step": 9, "loss": 1.0}]
    first = draw_curves(lines, history)
    assert first == draw_curves(lines, history)
    assert first[0].dark != first[0].light
    assert first[0].light.count("path") == first[0].dark.count("path")
    root = ElementTree.fromstring(first[0].light)
    texts = {element.text for element in root.iter() if element.tag.endswith("text")}
    assert {"training", "evaluation", "step"} <= texts


@pytest.mark.parametrize("count", [10, 100_000])
def test_a_long_run_is_drawn_with_few_points(count: int) -> None:
    lines = [{"step": step, "memory_gib": float(step % 7)} for step in range(1, count + 1)]
    (curve,) = draw_curves(lines, [])
    path = max(re.findall(r' d="([^"]*)"', curve.light), key=len)
    assert path.count("L") <= MOST_POINTS
    assert len(curve.light) < 60_000


def test_a_smoothed_straight_line_is_straight() -> None:
    lines = [log_line(step, loss=float(step)) for step in range(1, 201)]
    curve = draw_curves(lines, [])[0]
    measured, smoothed = re.findall(r' d="([^"]*)"[^>]*stroke: #4f46e5', curve.light)[:2]
    assert measured == smoothed
