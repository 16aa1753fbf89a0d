"""From a folder of videos to a trained, evaluated model, with the public commands.

    uv run examples/quickstart.py                      # makes its own clips: 5 minutes on 2 cores
    uv run examples/quickstart.py --source my_clips    # yours: train|val|test/<Class>/*.avi

Each command is printed before it runs, so that you can type it yourself. The clips it makes show a
square that is red or blue and comes nearer or goes away: four classes, told apart by colour and
motion together. The first frame says nothing of the motion, and no single frame says much: how
large the square starts differs more from clip to clip than its size changes within one.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np

CLASSES = ("BlueAway", "BlueNear", "RedAway", "RedNear")
CLIPS_PER_CLASS = {"train": 60, "val": 15}
WIDTH, HEIGHT, FRAMES_PER_SECOND, NUM_FRAMES = 320, 240, 25, 24
FIRST_SIDE = (80, 200)  # pixels: the square's side in the first frame, anything in between
GROWTH = 5 / 3  # pixels a frame, or as much shrinking


def make_clips(folder: Path, *, seed: int = 0, shuffle_labels: bool = False) -> None:
    """Write AVI files as UCF-101 has them: `<split>/<Class>/v_<Class>_g01_c01.avi`.

    A group shares a background, as the clips of one source video do; no group is in two splits.
    With `shuffle_labels` the class folder of a clip says nothing of what it shows.
    """
    random = np.random.default_rng(seed)
    group = 0
    for split, count in CLIPS_PER_CLASS.items():
        for start in range(0, count, 5):
            group += 1
            background = int(random.integers(60, 110))
            for name in CLASSES:
                for clip in range(1, 1 + min(5, count - start)):
                    path = folder / split / name / f"v_{name}_g{group:02d}_c{clip:02d}.avi"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    shown = str(random.choice(CLASSES)) if shuffle_labels else name
                    write_clip(path, shown, background, random)


def write_clip(path: Path, name: str, background: int, random: np.random.Generator) -> None:
    """One clip: a square in front of noise, growing or shrinking."""
    colour = (40, 40, 220) if name.startswith("Red") else (220, 40, 40)  # blue, green, red
    direction = -1 if name.endswith("Away") else 1
    first_side = random.uniform(*FIRST_SIDE)
    centre_x, centre_y = random.uniform(120, WIDTH - 120), HEIGHT / 2
    noise = random.integers(-6, 7, (HEIGHT, WIDTH, 3))
    video = cv2.VideoWriter(
        str(path), cv2.VideoWriter.fourcc(*"XVID"), FRAMES_PER_SECOND, (WIDTH, HEIGHT)
    )
    for number in range(NUM_FRAMES):
        half = (first_side + direction * GROWTH * number) / 2
        frame = background + np.roll(noise, 17 * number, axis=1)
        rows = slice(max(0, round(centre_y - half)), round(centre_y + half))
        columns = slice(max(0, round(centre_x - half)), round(centre_x + half))
        frame[rows, columns] = colour
        video.write(frame.clip(0, 255).astype(np.uint8))
    video.release()


def run(*arguments: object) -> None:
    """Print a command as one would type it, and run it."""
    command = [str(argument) for argument in arguments]
    print(f"\n$ {shlex.join(command)}", flush=True)
    beside_python = Path(sys.executable).with_name(command[0])  # an environment not activated
    program = [str(beside_python)] if beside_python.exists() else command[:1]
    status = subprocess.run([*program, *command[1:]]).returncode
    if status:  # the command has said why
        sys.exit(status)


def main() -> None:
    """Run the whole path and print where it led."""
    parser = argparse.ArgumentParser(description="The whole path, on made clips.")
    parser.add_argument("--source", type=Path, help="your clips: train|val|test/<Class>/*.avi")
    parser.add_argument("--out_dir", "--out-dir", type=Path, default=Path("quickstart_run"))
    parser.add_argument("--num_frames", "--num-frames", type=int, default=4, help="frames a clip")
    parser.add_argument("--num_epochs", "--num-epochs", type=int, default=6)
    parser.add_argument(
        "--shuffle_labels",
        "--shuffle-labels",
        action="store_true",
        help="control: it must learn nothing",
    )
    arguments = parser.parse_args()
    out, started = arguments.out_dir, time.monotonic()
    shutil.rmtree(out, ignore_errors=True)
    source = arguments.source
    if source is None:
        source = out / "clips"
        print(f"making {sum(CLIPS_PER_CLASS.values()) * len(CLASSES)} short clips in {source}")
        make_clips(source, shuffle_labels=arguments.shuffle_labels)

    run("phi3v-data", "convert", "ucf101", source, "--out_dir", out / "data",
        "--num_frames", arguments.num_frames)  # fmt: skip
    for split in ("train", "val"):
        file = out / "data" / f"ucf101_{split}.jsonl"
        if not file.is_file():
            sys.exit(f"no clips in {source / split}: the quickstart needs train/ and val/")
        run("phi3v-data", "validate", file)
        run("phi3v-data", "shard", file, "--out_dir", out / "shards" / split)
    run("phi3v-train", "init", "tiny", out / "tiny")
    run("phi3v-train", "launch",
        f"model={out / 'tiny'}", f"output_dir={out / 'train'}",
        f"data.train={out / 'shards' / 'train'}", f"data.eval={out / 'shards' / 'val'}",
        "data.num_crops=1", "eval.before=true", "eval.max_new_tokens=16",
        f"train.num_epochs={arguments.num_epochs}", "train.global_batch_size=4",
        "train.log_every=20", "optim.learning_rate=2e-3", "optim.warmup_steps=20",
        "optim.weight_decay=0.0",
    )  # fmt: skip
    run("phi3v-train", "eval", "--model", out / "train" / "model",
        "--data", out / "shards" / "val", "--num_crops", 1, "--max_new_tokens", 16,
        "--out_dir", out / "eval")  # fmt: skip

    before = json.loads((out / "train" / "eval_before.json").read_text())["accuracy"]
    after = json.loads((out / "eval" / "eval.json").read_text())["accuracy"]
    print(f"""
accuracy on held-out clips: {before:.2f} before training, {after:.2f} after it
took {time.monotonic() - started:.0f} s

the samples       {out / "data"}
every answer      {out / "eval" / "predictions.jsonl"}
the training log  {out / "train" / "log.jsonl"}
the model         {out / "train" / "model"}""")


if __name__ == "__main__":
    sys.exit(main())
