"""How fast a run is, between two lines of its log.

    meter = Meter(peak_flops=312e12, num_devices=8)
    meter.add(tokens=..., images=..., flops=..., wait_seconds=...)     # each step
    with meter.outside(): save()                                       # is no training time
    reading = meter.read()                                             # and begins anew

    reading.tokens_per_second, reading.mfu, reading.data_wait          # 41_200.0, 0.47, 0.01

Counts are of all ranks together. MFU is the share of the devices' peak that went into operations
the model needs (`phi3v_train.flops`); it is there only where the peak is known.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reading:
    """Rates of an interval."""

    tokens_per_second: float
    images_per_second: float
    data_wait: float
    """Share of the time that the trainer waited for its rows, the mean over the ranks; 0 to 1."""

    mfu: float | None
    """Model operations / (time x devices x peak); None where the peak is not known."""


class Meter:
    """Sums over the steps since the last reading.

    Args:
        peak_flops: of one device, per second; None: not known.
        num_devices: of the run.
        clock: seconds from anywhere.
    """

    def __init__(
        self,
        *,
        peak_flops: float | None = None,
        num_devices: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._peak = None if peak_flops is None else peak_flops * num_devices
        self._clock = clock
        self._began = clock()
        self._restart()

    def _restart(self) -> None:
        self._started = self._clock()
        self._outside = 0.0
        self._tokens = self._images = self._flops = self._wait = 0.0

    def add(self, *, tokens: float, images: float, flops: float, wait_seconds: float) -> None:
        """Count one step.

        Args:
            tokens: of all ranks.
            images: of all ranks.
            flops: operations that the model needs for them, of all ranks.
            wait_seconds: that the trainer waited for its rows, the mean over the ranks.
        """
        self._tokens += tokens
        self._images += images
        self._flops += flops
        self._wait += wait_seconds

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Time in here is no training time: a checkpoint, an evaluation."""
        entered = self._clock()
        try:
            yield
        finally:
            self._outside += self._clock() - entered

    def read(self) -> Reading:
        """The rates since the last reading; the next interval begins."""
        # A clock that has not moved on: an interval of one step that took no time to speak of.
        seconds = max(self._clock() - self._started - self._outside, 1e-9)
        reading = Reading(
            tokens_per_second=self._tokens / seconds,
            images_per_second=self._images / seconds,
            data_wait=min(self._wait / seconds, 1.0),
            mfu=None if self._peak is None else self._flops / (seconds * self._peak),
        )
        self._restart()
        return reading

    def seconds_left(self, num_done: int, num_left: int) -> float:
        """What `num_left` steps will take, pauses included, at the pace of those done so far."""
        assert num_done > 0
        return (self._clock() - self._began) / num_done * num_left


def as_duration(seconds: float) -> str:
    """`42s`, `3m10s`, `2h05m`, `3d04h`."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest}s"
    hours, minutes = divmod(minutes, 60)
    if not hours:
        return f"{minutes}m{rest:02}s"
    days, hours = divmod(hours, 24)
    return f"{hours}h{minutes:02}m" if not days else f"{days}d{hours:02}h"
