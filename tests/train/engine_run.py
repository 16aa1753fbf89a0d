"""A run of training on one thread, in each process of a group; started through torchrun.

    python -m torch.distributed.run --standalone --nproc_per_node=2 -m tests.train.engine_run FILE

FILE is JSON: the list of the run's overrides.
"""

import json
import sys
from pathlib import Path

import torch
from phi3v_train.config import load_config
from phi3v_train.trainer import train

if __name__ == "__main__":
    torch.set_num_threads(1)
    train(load_config(None, json.loads(Path(sys.argv[1]).read_text())))
