"""Runs of training, one after another, in each process of one group; started through torchrun.

    python -m torch.distributed.run --standalone --nproc_per_node=2 -m tests.train.engine_run FILE

    {"runs": {"lora": {"overrides": ["model=…", …], "goes_on_from": null}},
     "forgotten": {"zero2": {"engine": "zero2"}}}

FILE is such JSON: runs, some from a checkpoint of another run, and engines that get a model with a
parameter that nothing uses. Beside it appears `told.json`: {name: what each process raised, or
null}. One thread each.
"""

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from phi3v_train.config import MethodConfig, ParallelConfig, load_config
from phi3v_train.engine import World, join_world
from phi3v_train.engine_choice import make_engine
from phi3v_train.guards import guard_gradients
from phi3v_train.methods import prepare
from phi3v_train.trainer import train
from torch import nn

from tests.train.small_models import Prompt, packed_row, small_model


def main(file: Path) -> None:
    """Do all that the file lists."""
    for _ in range(5):  # a group after another, as runs of one program have them
        group = join_world("cpu")
        assert group.sum(1) == [group.world_size]
        group.leave()
    world = join_world("cpu")
    asked = json.loads(file.read_text())
    works: dict[str, Callable[[], None]] = {
        **{name: partial(run, settings, world) for name, settings in asked["runs"].items()},
        **{name: partial(forget, settings, world) for name, settings in asked["forgotten"].items()},
    }
    told: dict[str, list[str | None]] = {}
    for name, work in works.items():
        error: str | None = None
        try:
            work()
        except ValueError as raised:  # where one process alone raises, the group hangs, and fails
            error = str(raised)
        told[name] = world.gather(error)
        if world.is_main:
            (file.parent / "told.json").write_text(json.dumps(told))
    world.leave()


def run(settings: dict[str, Any], world: World) -> None:
    """Train, perhaps from a copy of another run's checkpoint."""
    config = load_config(None, settings["overrides"])
    if settings["goes_on_from"] is not None and world.is_main:
        source = Path(settings["goes_on_from"])
        checkpoints = config.output_dir / "checkpoints"
        shutil.copytree(source, checkpoints / source.name)
        (checkpoints / "latest").write_text(f"{source.name}\n")
    world.barrier()
    train(config, resume=settings["goes_on_from"] is not None)


def forget(parallel: dict[str, Any], world: World) -> None:
    """The first backward pass of a model with a parameter that nothing uses, and its guard."""
    model = small_model()
    model.register_parameter("forgotten", nn.Parameter(torch.zeros(2)))
    engine = make_engine(
        ParallelConfig.model_validate(parallel),
        prepare(model, MethodConfig(), "fp32"),
        world,
        lambda trainable: torch.optim.AdamW(trainable.values(), lr=1e-2),
        max_grad_norm=1.0,
    )
    row = packed_row(Prompt(12, ((1, 1),), seed=2))
    engine.backward(engine.loss_sum(row, is_last=True), is_last=True)
    guard_gradients(engine)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
