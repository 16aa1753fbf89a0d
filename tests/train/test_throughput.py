import pytest
from phi3v_train.throughput import Meter, as_duration


class Clock:
    """Stands still until told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rates_are_counts_over_the_time_since_the_last_reading() -> None:
    clock = Clock()
    meter = Meter(peak_flops=1000.0, num_devices=2, clock=clock)
    for _ in range(2):
        clock.now += 5
        meter.add(tokens=200, images=10, flops=4000, wait_seconds=1)
    reading = meter.read()
    assert (reading.tokens_per_second, reading.images_per_second) == (40, 2)
    assert reading.data_wait == pytest.approx(0.2)
    assert reading.mfu == pytest.approx(8000 / (10 * 2 * 1000))
    clock.now += 1
    meter.add(tokens=7, images=0, flops=0, wait_seconds=0)
    assert meter.read().tokens_per_second == 7


def test_time_outside_is_no_training_time_but_delays_the_end() -> None:
    clock = Clock()
    meter = Meter(clock=clock)
    clock.now += 2
    with meter.outside():
        clock.now += 8
    meter.add(tokens=100, images=0, flops=1, wait_seconds=0)
    assert meter.read().tokens_per_second == 50
    assert meter.seconds_left(num_done=1, num_left=3) == 30


def test_time_outside_counts_where_the_block_fails() -> None:
    clock = Clock()
    meter = Meter(clock=clock)
    clock.now += 2

    def fail() -> None:
        with meter.outside():
            clock.now += 8
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    meter.add(tokens=100, images=0, flops=1, wait_seconds=0)
    assert meter.read().tokens_per_second == 50


def test_without_a_known_peak_there_is_no_mfu() -> None:
    meter = Meter()
    meter.add(tokens=1, images=1, flops=1e12, wait_seconds=0)
    assert meter.read().mfu is None


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0s"), (59.6, "1m00s"), (190, "3m10s"), (7500, "2h05m"), (273_600, "3d04h")],
)
def test_durations_are_short(seconds: float, expected: str) -> None:
    assert as_duration(seconds) == expected
