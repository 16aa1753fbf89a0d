"""Damage a shard directory again and again, and read it: run in a process, which may crash.

    python damage_trials.py DIRECTORY SEED NUM_TRIALS [verify]

Each trial does one thing to one file (or two), reads every row, compares with what was there
before, and undoes it. Prints counts as JSON: `wrong` rows should be 0, and `unfound`, trials that
`verify_shards` did not notice, too.
"""

import json
import os
import random
import sys
from collections import Counter
from pathlib import Path

from phi3v_data.shard_format import ShardError
from phi3v_data.shard_verify import verify_shards
from phi3v_data.shards import Record, open_shards

Content = tuple[str, tuple[bytes, ...]]


def content_of(record: Record) -> Content:
    return record.sample.to_json(), tuple(map(bytes, record.images))


def damage(folder: Path, rng: random.Random) -> str:
    """Do something to it; returns what was done."""
    names = sorted(os.listdir(folder))
    kind = rng.choices(["flip", "bytes", "cut", "delete", "swap"], [60, 20, 10, 5, 5])[0]
    path = folder / rng.choice(names)
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    if kind == "flip":
        content[place] ^= 1 << rng.randrange(8)
    elif kind == "bytes":
        for at in range(place, min(place + rng.randint(1, 64), len(content))):
            content[at] ^= rng.randint(1, 255)
    elif kind == "cut":
        content = content[:place]
    elif kind == "delete":
        path.unlink()
        return f"delete {path.name}"
    else:
        other = folder / rng.choice([name for name in names if name != path.name])
        spare = folder.parent / "spare"
        os.rename(path, spare)
        os.rename(other, path)
        os.rename(spare, other)
        return f"swap {path.name} {other.name}"
    path.write_bytes(content)
    return f"{kind} {path.name} {place}"


def read(folder: Path, expected: list[Content], counts: Counter[str], what: str) -> None:
    """Read every row of a damaged directory."""
    try:
        reader = open_shards(folder)
    except ShardError:
        counts["refused"] += 1
        return
    assert len(reader) == len(expected), what
    for row, content in enumerate(expected):
        record = reader.try_get(row)
        if record is None:
            counts["damaged_rows"] += 1
            assert reader.damaged[row], what
        elif content_of(record) != content:
            counts["wrong"] += 1
            sys.stderr.write(f"{what}: row {row} is wrong\n")


def main() -> None:
    folder, seed, num_trials = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    rng = random.Random(seed)
    originals = {path.name: path.read_bytes() for path in folder.iterdir()}
    expected = [content_of(record) for record in open_shards(folder)]
    counts: Counter[str] = Counter(wrong=0, unfound=0, damaged_rows=0, refused=0)
    for _ in range(num_trials):
        what = damage(folder, rng)
        counts[what.split()[0]] += 1
        read(folder, expected, counts, what)
        if "verify" in sys.argv[4:]:
            try:
                is_found = bool(verify_shards(folder))
            except ShardError:
                is_found = True
            if not is_found:
                counts["unfound"] += 1
                sys.stderr.write(f"{what}: not found by verify\n")
        for name, content in originals.items():
            if not (folder / name).is_file() or (folder / name).read_bytes() != content:
                (folder / name).write_bytes(content)
    sys.stdout.write(json.dumps(counts))


if __name__ == "__main__":
    main()
