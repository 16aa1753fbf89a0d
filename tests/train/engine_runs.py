"""Runs of training one after the other, in each process of a group; started through torchrun.

    python -m torch.distributed.run --standalone --nproc_per_node=2 engine_runs.py RUNS

RUNS is a JSON file: a list of runs, each the list of its overrides.
"""

import json
import sys
from pathlib import Path

import torch
from phi3v_train.config import load_config
from phi3v_train.trainer import train

if __name__ == "__main__":
    torch.set_num_threads(1)
    for overrides in json.loads(Path(sys.argv[1]).read_text()):
        train(load_config(None, overrides))
