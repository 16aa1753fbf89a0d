import pytest
from hypothesis import given
from hypothesis import strategies as st
from phi3v_train.config import OptimConfig
from phi3v_train.schedule import learning_rate

PEAK = 1e-3


def rates(schedule: str, warmup_steps: int, num_steps: int) -> list[float]:
    optim = OptimConfig.model_validate(
        {"learning_rate": PEAK, "schedule": schedule, "warmup_steps": warmup_steps}
    )
    return [learning_rate(optim, step, num_steps) for step in range(num_steps + 1)]


kinds = st.sampled_from(["linear", "cosine", "constant"])


def test_the_rate_rises_to_its_peak_and_falls_in_a_line_to_zero() -> None:
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert rates("linear", 4, 8) == pytest.approx([PEAK * share for share in expected])


def test_cosine_is_at_half_its_peak_half_way_down() -> None:
    found = rates("cosine", 2, 12)
    assert found[2] == pytest.approx(PEAK)
    assert found[7] == pytest.approx(PEAK / 2)
    assert found[12] == pytest.approx(0)


def test_constant_stays_level() -> None:
    assert rates("constant", 2, 6)[2:] == [PEAK] * 5


@given(kinds, st.integers(0, 30), st.integers(1, 60))
def test_every_step_of_a_run_has_a_rate_above_zero_and_none_above_the_peak(
    schedule: str, warmup_steps: int, num_steps: int
) -> None:
    found = rates(schedule, warmup_steps, num_steps)[:num_steps]
    assert all(0 < rate <= PEAK * (1 + 1e-12) for rate in found)


@given(kinds, st.integers(0, 10), st.integers(11, 60))
def test_the_rate_rises_over_the_warm_up_and_never_after(
    schedule: str, warmup_steps: int, num_steps: int
) -> None:
    found = rates(schedule, warmup_steps, num_steps)
    assert found[:warmup_steps] == sorted(found[:warmup_steps])
    after = found[warmup_steps:]
    assert after == sorted(after, reverse=True)


def test_a_run_that_is_shorter_than_its_warm_up_is_fine() -> None:
    assert rates("linear", 50, 2)[:2] == pytest.approx([PEAK / 50, PEAK / 25])
