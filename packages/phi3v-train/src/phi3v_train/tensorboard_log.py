"""The log as TensorBoard shows it: `tensorboard --logdir runs`.

    runs/first/tensorboard/events.out.tfevents...    train/loss, train/mfu, eval/accuracy, ...

The only module that imports TensorBoard. What a run logged beyond the step it goes on from is
hidden there.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi3v_train.quiet import quiet


class TensorBoardLog:
    """Event files of a run.

    Args:
        folder: where they go.
        start: steps already done.
    """

    def __init__(self, folder: Path, *, start: int) -> None:
        # Seconds to import, and only the main process writes.
        with quiet():
            from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write values by name, `train/loss`, after `step` steps."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, name: str, content: str) -> None:
        """Write a text, shown as it is."""
        indented = "\n".join(f"    {line}" for line in content.splitlines())
        self._writer.add_text(name, indented)

    def flush(self) -> None:
        """Make what was written visible."""
        self._writer.flush()

    def close(self) -> None:
        """No more will come."""
        self._writer.close()
