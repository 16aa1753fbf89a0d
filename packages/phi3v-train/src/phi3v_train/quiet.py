"""Libraries kept quiet while we call them: a run's screen shows what is about the run.

    with quiet("torch.distributed is disabled"):
        save(...)

What they would say elsewhere, they still say: nothing is switched off for longer than the block.
"""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging


@contextmanager
def quiet(*warning_starts: str) -> Iterator[None]:
    """Inside the block transformers shows no progress bars, and some warnings are left out.

    Args:
        warning_starts: how the messages begin that are left out; all others are shown.
    """
    previous = logging.set_tqdm_hook(_without_bar)
    try:
        with warnings.catch_warnings():
            for start in warning_starts:
                warnings.filterwarnings("ignore", message=re.escape(start))
            yield
    finally:
        logging.set_tqdm_hook(previous)


def _without_bar(
    factory: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
) -> Any:
    return factory(*args, **{**options, "disable": True})
