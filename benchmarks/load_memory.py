"""What loading a checkpoint takes in memory, beside the weights it ends with.

    uv run python benchmarks/load_memory.py

Writes a random checkpoint of about 1 GB in bfloat16, in shards, and loads it in a fresh process by
each door. The parent polls the child's anonymous memory (`RssAnon` of /proc: heap, not the pages
of mapped files, which the kernel can drop), so a busy interpreter hides no peak. Peaks are net of
what the child held before it loaded (interpreter, torch, transformers).

    door                                dtype      weights   peak      peak/weights  kept/weights
    from_pretrained(dtype="auto")       bfloat16   1.03 GB   1.0x GB   1.0x          1.00
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

LIMIT = 1.15
"""The claim: peak anonymous memory of a load, as a multiple of the weights loaded."""

DOORS = {
    'from_pretrained(dtype="auto")': ("from_pretrained", "auto"),
    "from_pretrained(dtype=bfloat16)": ("from_pretrained", "bfloat16"),
    "from_pretrained(dtype=float32)": ("from_pretrained", "float32"),
    "methods.load_model(dtype=bfloat16)": ("load_model", "bfloat16"),
    "methods.load_model(dtype=float32)": ("load_model", "float32"),
}

POLL_SECONDS = 0.001


@dataclass(frozen=True)
class Measurement:
    """One load in a process of its own; sizes in bytes."""

    door: str
    weights: int
    """Of the loaded model, all parameters."""
    before: int
    """Anonymous memory when the child was ready to load."""
    peak: int
    """Its largest value until the model was loaded."""
    kept: int
    """Its value then."""
    seconds: float

    @property
    def peak_ratio(self) -> float:
        """Peak, net of the child's own, in weights."""
        return (self.peak - self.before) / self.weights

    @property
    def kept_ratio(self) -> float:
        """What stays, in weights; near 0 where the weights stay pages of the mapped file."""
        return (self.kept - self.before) / self.weights


def write_checkpoint(folder: Path, num_layers: int = 8, shard_bytes: int = 200_000_000) -> int:
    """Write config.json, shards and their index: the real vision tower, a narrow decoder.

    Returns:
        Bytes of all weights.
    """
    import torch
    from phi3v_train.configuration_phi3_v import Phi3VConfig
    from phi3v_train.modeling_phi3_v import Phi3VForCausalLM
    from safetensors.torch import save_file

    config = Phi3VConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        rope_factors={"short_factor": [1.0] * 32, "long_factor": [4.0] * 32},
        dtype=torch.bfloat16,
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Phi3VForCausalLM(config).named_parameters()}
    shards: list[dict[str, Any]] = [{}]
    total = 0
    for name, shape in shapes.items():
        size = 2 * shape.numel()
        if shards[-1] and sum(2 * s.numel() for s in shards[-1].values()) + size > shard_bytes:
            shards.append({})
        shards[-1][name] = shape
        total += size
    torch.manual_seed(0)
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {n: torch.randn(s, dtype=torch.bfloat16) * 0.02 for n, s in shard.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return total


def load(door: str, folder: Path) -> None:
    """The child: say ready, load when told, say what was loaded, wait to be measured."""
    import torch
    from phi3v_train.methods import load_model
    from phi3v_train.modeling_phi3_v import Phi3VForCausalLM

    torch.set_num_threads(1)
    name, dtype = DOORS[door]
    _say("ready")
    sys.stdin.readline()
    started = time.perf_counter()
    if name == "load_model":
        model = load_model(folder, dtype=getattr(torch, dtype))
    else:
        model = Phi3VForCausalLM.from_pretrained(folder, dtype=dtype)
    seconds = time.perf_counter() - started
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    _say(json.dumps({"weights": weights, "seconds": seconds}))
    sys.stdin.readline()


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def anonymous_memory(pid: int) -> int:
    """`RssAnon` of a process, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{pid}/status has no RssAnon: this needs Linux 4.5 or later")


def measure(door: str, folder: Path) -> Measurement:
    """Load in a fresh process, and watch it from here.

    Raises:
        RuntimeError: the child failed; its own message is on the screen.
    """
    command = [sys.executable, __file__, "--child", door, "--folder", str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        if child.stdout.readline().strip() != "ready":
            raise RuntimeError(f"{door}: the loading process ended before it was ready")
        before = peak = anonymous_memory(child.pid)
        os.set_blocking(child.stdout.fileno(), False)
        child.stdin.write("go\n")
        answer = ""
        while not answer:
            peak = max(peak, anonymous_memory(child.pid))
            answer = child.stdout.readline()
            if child.poll() is not None:
                raise RuntimeError(f"{door}: the loading process ended with {child.returncode}")
            time.sleep(POLL_SECONDS)
        kept = anonymous_memory(child.pid)
        child.stdin.write("stop\n")
    loaded = json.loads(answer)
    return Measurement(door, loaded["weights"], before, peak, kept, loaded["seconds"])


def report(rows: list[Measurement]) -> str:
    """A table, one door a line."""
    lines = [
        f"{'door':36}{'weights':>10}{'peak':>10}{'peak/weights':>14}{'kept/weights':>14}{'s':>7}"
    ]
    for row in rows:
        lines.append(
            f"{row.door:36}{row.weights / 1e9:>7.2f} GB{(row.peak - row.before) / 1e9:>7.2f} GB"
            f"{row.peak_ratio:>14.3f}{row.kept_ratio:>14.3f}{row.seconds:>7.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse, measure, print; exit status 1 where a door exceeds the limit."""
    parser = argparse.ArgumentParser(description="Peak memory of loading a checkpoint")
    parser.add_argument("--num_layers", type=int, default=8, help="decoder layers (8: 1 GB)")
    parser.add_argument("--folder", type=Path, help="a checkpoint to load instead of a random one")
    parser.add_argument(
        "--door", choices=tuple(DOORS), action="append", help="measure this one only; repeatable"
    )
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    parser.add_argument("--child", choices=tuple(DOORS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        load(options.child, options.folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch) / "checkpoint"
        if options.folder is None:
            write_checkpoint(folder, options.num_layers)
        rows = [measure(door, folder) for door in options.door or DOORS]
    _say(report(rows))
    if options.json:
        results = [
            {**asdict(r), "peak_ratio": r.peak_ratio, "kept_ratio": r.kept_ratio} for r in rows
        ]
        libraries = ("torch", "transformers", "safetensors")
        content = {"results": results, "versions": {name: version(name) for name in libraries}}
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    if any(row.peak_ratio >= LIMIT for row in rows):
        sys.exit(f"a load took {LIMIT} x its weights or more")


if __name__ == "__main__":
    main()
