import json
from typing import Any

import pytest

from tests.golden.record import GOLDEN, measure


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text())


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return measure()


def test_the_picture_is_resized_and_padded_to_the_recorded_pixels(
    measured: dict[str, Any], recorded: dict[str, Any]
) -> None:
    for name in ("canvas_hw", "canvas_sum", "canvas_diagonal"):
        assert measured[name] == recorded[name], name


def test_logits_and_loss_of_a_packed_row_are_the_recorded_ones(
    measured: dict[str, Any], recorded: dict[str, Any]
) -> None:
    assert measured["loss_sum"] == pytest.approx(recorded["loss_sum"], abs=2e-4)
    assert measured["hidden_norm"] == pytest.approx(recorded["hidden_norm"], abs=1e-4)
    for row, expected in zip(measured["last_logits"], recorded["last_logits"], strict=True):
        assert row == pytest.approx(expected, abs=1e-4)


def test_gradient_norms_are_the_recorded_ones(
    measured: dict[str, Any], recorded: dict[str, Any]
) -> None:
    assert measured["gradient_norms"].keys() == recorded["gradient_norms"].keys()
    for name, norm in recorded["gradient_norms"].items():
        # The floor is for key biases, whose gradient is rounding noise: they move no softmax.
        assert measured["gradient_norms"][name] == pytest.approx(norm, rel=1e-4, abs=1e-4), name
