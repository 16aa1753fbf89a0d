"""Toy videos: every frame differs from every other, and codecs cannot blur that away."""

from pathlib import Path

import cv2
import numpy as np


def write_clip(path: Path, num_frames: int = 12, *, fourcc: str = "XVID", seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*fourcc), 25, (64, 48))
    assert writer.isOpened()
    rng = np.random.default_rng(seed)
    for _ in range(num_frames):
        blocks = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        writer.write(np.kron(blocks, np.ones((8, 8, 1), dtype=np.uint8)))
    writer.release()
    return path


def write_tree(root: Path, clips_per_class: int = 2) -> Path:
    """`root/{train,val,test}/{Archery,Biking}/v_<Class>_gNN_c01.avi`."""
    for split_number, split in enumerate(("train", "val", "test")):
        for label in ("Archery", "Biking"):
            for number in range(clips_per_class):
                name = f"v_{label}_g{10 * split_number + number:02}_c01.avi"
                write_clip(root / split / label / name, seed=split_number * 100 + number)
    return root


def decode_all(path: Path) -> list[np.ndarray]:
    """Every frame of a plain sequential decode, by OpenCV's defaults."""
    capture = cv2.VideoCapture(str(path))
    frames: list[np.ndarray] = []
    while True:
        done, frame = capture.read()
        if not done:
            return frames
        frames.append(frame)


def truncate(path: Path, fraction: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    return path
