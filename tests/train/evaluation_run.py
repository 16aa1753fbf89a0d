"""Runs that evaluate, and an `eval`, in each process of one group; started through torchrun.

    python -m torch.distributed.run --standalone --nproc_per_node=2 -m tests.train.evaluation_run F

F is JSON: {"runs": [["model=…", …], …], "eval": {"model": …, "data": …, "out_dir": …}}. One thread
each.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from phi3v_train.config import load_config
from phi3v_train.engine import join_world
from phi3v_train.evaluate import evaluate_model
from phi3v_train.trainer import train

if __name__ == "__main__":
    torch.set_num_threads(1)
    asked: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    world = join_world("cpu")
    for overrides in asked["runs"]:
        train(load_config(None, overrides))
    evaluate_model(**asked["eval"])
    world.leave()
