"""The log at Weights & Biases, where `log.wandb` names a project.

    log: {wandb: my-project}

The only module that imports wandb, which the extra `phi3v-train[wandb]` installs. A run that goes
on keeps its page: the run's id is kept in its folder.
"""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi3v_data.atomic import write_atomic

RUN_ID = Path("logs") / "wandb-id"
"""Below the run's folder."""


class WandbLog:
    """The page of a run.

    Args:
        project: its name at Weights & Biases.
        output_dir: the run's folder; its name is the run's.
        config: every setting of the run.

    Raises:
        ValueError: wandb is not installed.
    """

    def __init__(self, project: str, output_dir: Path, config: Mapping[str, Any]) -> None:
        wandb = require_wandb()
        id_file = output_dir / RUN_ID
        if not id_file.is_file():
            write_atomic(id_file, secrets.token_hex(8) + "\n")
        self._run: Any = wandb.init(
            project=project,
            name=output_dir.name,
            id=id_file.read_text().strip(),
            resume="allow",
            dir=str(id_file.parent),
            config=dict(config),
        )
        # Our own step is the axis: after a resume it starts below the last one wandb saw.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write values by name, `train/loss`, after `step` steps."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """No more will come."""
        self._run.finish()


def require_wandb() -> Any:
    """The wandb package.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import wandb  # pyright: ignore[reportMissingImports]: an extra
    except ModuleNotFoundError:
        raise ValueError(
            "log.wandb is set, but wandb is not installed; install the extra phi3v-train[wandb] "
            "(`uv sync --extra wandb` in this repository), or leave log.wandb out"
        ) from None
    return wandb
