"""What the plan of an epoch costs, how full its rows are, how even its ranks, how mixed its order.

    uv run python benchmarks/plan.py

Three tables, of made data (`length_mixes` says how):

1. time and peak memory of a plan with all its steps dealt, on one core, in a process of its own;
   and of a plan made shard by shard, which holds only what its window spans;
2. rows and balance on length mixes like those of DocVQA, NLVR2 and UCF-101, beside random dealing
   (the samples of a step to the ranks as they come, packed there by best-fit decreasing);
3. the order: rank correlation with the files, and for windows of shards how well it mixes and how
   many shards are open.
"""

import bisect
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
from phi3v_train.deal import fewest_rows, sample_cost
from phi3v_train.epoch_order import Numbers, Shards, epoch_order, windowed_order
from phi3v_train.hd_transform import hd_layout
from phi3v_train.plan import plan_epoch
from phi3v_train.shard_plan import ShardMeasures, plan_shards

CAPACITY = 8192
PER_SHARD = 10_000
SHARD_BYTES = 64 << 20

LIMIT_SECONDS = 60
LIMIT_BYTES = 2 * 10**9
LIMIT_ROWS = 1.03
LIMIT_BALANCE = 0.95


# --- lengths -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Mix:
    """Tokens and crops of every sample."""

    num_tokens: Numbers
    num_crops: Numbers


def _measured(sizes_wh: list[list[tuple[int, int]]], texts: Numbers, num_crops: int) -> Mix:
    layouts = [[hd_layout(w, h, num_crops) for w, h in sizes] for sizes in sizes_wh]
    tokens = [sum(layout.num_tokens for layout in of) for of in layouts]
    crops = [sum(layout.grid[0] * layout.grid[1] + 1 for layout in of) for of in layouts]
    return Mix(np.array(tokens) + texts, np.array(crops))


def length_mixes(num_samples: int, seed: int = 0) -> dict[str, Mix]:
    """Lengths as the arithmetic of the crops makes them from images of such shapes.

    DocVQA: a scanned page, portrait mostly, 16 crops, a short question. NLVR2: two pictures from
    the web, of any shape between 1:2 and 2:1, 4 crops each. UCF-101: eight frames of 320 x 240,
    4 crops each, one question for all. Mixed: a third of each.
    """
    random = np.random.default_rng(seed)

    def texts(mean: int) -> Numbers:
        return 15 + random.gamma(2.0, mean / 2, num_samples).astype(np.int64)

    def page() -> tuple[int, int]:
        ratio = float(np.clip(random.normal(1.3, 0.15), 0.6, 2.0))
        return 1700, int(1700 * ratio)

    def picture() -> tuple[int, int]:
        return int(500 * 2 ** random.uniform(-0.5, 0.5)), int(500 * 2 ** random.uniform(-0.5, 0.5))

    whole = range(num_samples)
    docvqa = _measured([[page()] for _ in whole], texts(20), 16)
    nlvr2 = _measured([[picture(), picture()] for _ in whole], texts(25), 4)
    ucf = _measured([[(320, 240)] * 8 for _ in whole], np.full(num_samples, 62), 4)
    pick = random.integers(0, 3, num_samples)
    mixed = Mix(
        np.choose(pick, [docvqa.num_tokens, nlvr2.num_tokens, ucf.num_tokens]),
        np.choose(pick, [docvqa.num_crops, nlvr2.num_crops, ucf.num_crops]),
    )
    return {"DocVQA": docvqa, "NLVR2": nlvr2, "UCF-101": ucf, "mixed": mixed}


# --- rows and balance ----------------------------------------------------------------------------


def best_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """Rows of the offline packing that we compare with, written without any of our code."""
    rooms: list[int] = []  # rising
    for length in sorted(lengths, reverse=True):
        place = bisect.bisect_left(rooms, length)
        room = rooms.pop(place) if place < len(rooms) else capacity
        bisect.insort(rooms, room - length)
    return len(rooms)


@dataclass(frozen=True)
class Packing:
    """One line of the second table; rows are summed over steps, and counted over all ranks."""

    mix: str
    global_batch: int
    world_size: int
    capacity: int

    run: int
    """Rows that we run, empty ones included."""
    filled: int
    """Rows of these that hold samples."""
    offline: int
    """Rows of best-fit decreasing over the whole step, whatever the ranks."""
    offline_equal: int
    """The same, rounded up to equally many on every rank."""
    bound_equal: int
    """A lower bound of any packing, rounded up likewise."""
    random_run: int
    """Rows that random dealing runs, empty ones included."""
    balance: float
    random_balance: float
    utilisation: float

    def line(self) -> str:
        """A row of the table."""
        return (
            f"{self.mix:9}{self.global_batch:>6}{self.world_size:>6}{self.capacity:>9,}"
            f"{self.run / self.offline_equal:>11.3f}{self.run / self.bound_equal:>8.3f}"
            f"{self.filled / self.offline:>9.3f}{self.random_run / self.offline_equal:>9.3f}"
            f"{self.utilisation:>7.1%}{self.balance:>9.1%}{self.random_balance:>9.1%}"
        )


PACKING_HEAD = (
    "mix       batch world capacity  run/BFD=   /bound filled/BFD  random  full   balance   random"
)


def measure_packing(name: str, mix: Mix, global_batch: int, world: int, capacity: int) -> Packing:
    """Deal an epoch of the mix, ours and at random, and count."""
    plan = plan_epoch(
        mix.num_tokens,
        mix.num_crops,
        seed=0,
        epoch=0,
        global_batch_size=global_batch,
        world_size=world,
        max_tokens_per_row=capacity,
    )
    summary = plan.summary()
    costs = sample_cost(mix.num_tokens, mix.num_crops)
    offline = offline_equal = bound_equal = random_run = 0
    random_balance = 0.0
    for step in range(plan.num_steps):
        samples = np.array(plan.samples(step))
        lengths = mix.num_tokens[samples]
        best = best_fit_decreasing(lengths.tolist(), capacity)
        offline += best
        offline_equal += -(-best // world) * world
        bound_equal += int(-(-fewest_rows(lengths[None], capacity)[0] // world) * world)
        hands = [samples[rank::world] for rank in range(world)]  # the order is random already
        most = max(best_fit_decreasing(mix.num_tokens[hand].tolist(), capacity) for hand in hands)
        random_run += most * world
        loads = [int(costs[hand].sum()) for hand in hands]
        random_balance += sum(loads) / world / max(loads)
    return Packing(
        mix=name,
        global_batch=global_batch,
        world_size=world,
        capacity=capacity,
        run=summary.num_rows + summary.num_empty_rows,
        filled=summary.num_rows,
        offline=offline,
        offline_equal=offline_equal,
        bound_equal=bound_equal,
        random_run=random_run,
        balance=summary.balance,
        random_balance=random_balance / plan.num_steps,
        utilisation=summary.utilisation,
    )


def packings(num_samples: int) -> Iterator[Packing]:
    """All lines of the second table."""
    for name, mix in length_mixes(num_samples).items():
        for global_batch, world, capacity in (
            (64, 1, 8192),
            (64, 8, 8192),
            (64, 8, 16384),
            (128, 8, 8192),
            (512, 8, 8192),
            (512, 64, 16384),
        ):
            yield measure_packing(name, mix, global_batch, world, capacity)


# --- order ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixing:
    """One line of the third table."""

    order: str
    correlation: float
    """Of place in the files and place in the epoch, by rank."""
    neighbours: float
    """Of a sample's place in the files and that of the one visited next."""
    mix: float
    """Distinct shards in a global batch, over those of the plain order."""
    live: float
    """Shards begun and not ended, over all; mean over the batches."""
    most_live: float

    def line(self) -> str:
        """A row of the table."""
        return (
            f"{self.order:24}{self.correlation:>12.4f}{self.neighbours:>12.4f}{self.mix:>8.2f}"
            f"{self.live:>8.1%}{self.most_live:>8.1%}"
        )


MIXING_HEAD = "order                    files~epoch  neighbours     mix    live    most"


def measure_mixing(
    name: str, order: Numbers, num_shards: int, batch: int, distinct: float | None
) -> tuple[Mixing, float]:
    """Quality of an order over equal shards; `distinct` shards in a batch of the plain order."""
    per_shard = len(order) // num_shards
    shard = order // per_shard
    batches = shard[: len(shard) // batch * batch].reshape(-1, batch)
    mean = float(np.mean([len(np.unique(row)) for row in batches]))
    first = np.full(num_shards, len(batches))
    last = np.zeros(num_shards, np.int64)
    at = np.repeat(np.arange(len(batches)), batch)
    np.minimum.at(first, batches.ravel(), at)
    np.maximum.at(last, batches.ravel(), at)
    begun = np.cumsum(np.bincount(first, minlength=len(batches) + 1))[: len(batches)]
    ended = np.cumsum(np.bincount(last, minlength=len(batches) + 1))[: len(batches)]
    live = (begun - np.concatenate([[0], ended[:-1]])) / num_shards
    correlation = float(np.corrcoef(np.arange(len(order)), order)[0, 1])
    neighbours = float(np.corrcoef(order[:-1], order[1:])[0, 1])
    mixing = Mixing(
        order=name,
        correlation=correlation,
        neighbours=neighbours,
        mix=mean / (mean if distinct is None else distinct),
        live=float(live.mean()),
        most_live=float(live.max()),
    )
    return mixing, mean


def mixings(num_shards: int = 1600, per_shard: int = 150, batch: int = 128) -> Iterator[Mixing]:
    """All lines of the third table: the plain order, then windows of so many shards."""
    samples = np.arange(num_shards * per_shard)
    plain, distinct = measure_mixing(
        "plain", epoch_order(samples, seed=0, epoch=0), num_shards, batch, None
    )
    yield plain
    for window in (512, 128, 20, 1):
        shards = Shards([per_shard] * num_shards, [SHARD_BYTES] * num_shards, window * SHARD_BYTES)
        order = windowed_order(samples, shards, seed=0, epoch=0)
        yield measure_mixing(f"window of {window} shards", order, num_shards, batch, distinct)[0]
    yield measure_mixing("files", samples, num_shards, batch, distinct)[0]


# --- time and memory -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """One line of the first table."""

    what: str
    num_samples: int
    cpu_seconds: float
    """Of one core, whatever else the machine does; what the limit is for."""
    wall_seconds: float
    peak_bytes: int
    """Largest resident size of the process, everything included."""

    def line(self) -> str:
        """A row of the table."""
        return (
            f"{self.what:34}{self.num_samples:>12,}{self.cpu_seconds:>8.1f} s"
            f"{self.wall_seconds:>8.1f} s{self.cpu_seconds / self.num_samples * 1e6:>7.2f} µs"
            f"{self.peak_bytes / 1e6:>8,.0f} MB"
        )


COST_HEAD = (
    "what                                   samples       cpu      wall   a sample       peak"
)


def _lengths(first: int, count: int) -> Mix:
    """Lengths of the mix of all three, drawn from 4,096 of them: making them is not measured."""
    small = length_mixes(4096)["mixed"]
    at = np.random.default_rng(first).integers(0, 4096, count)
    return Mix(small.num_tokens[at], small.num_crops[at])


Way = Callable[[int, int, int], Callable[[], None]]
"""Samples, global batch and ranks to what is measured."""


def plan_all(num_samples: int, global_batch: int, world: int) -> Callable[[], None]:
    """Plan at once, and deal every step."""
    mix = _lengths(0, num_samples)

    def run() -> None:
        plan = plan_epoch(
            mix.num_tokens,
            mix.num_crops,
            seed=0,
            epoch=0,
            global_batch_size=global_batch,
            world_size=world,
            max_tokens_per_row=CAPACITY,
        )
        assert plan.summary().num_samples == num_samples

    return run


def plan_by_shard(num_samples: int, global_batch: int, world: int) -> Callable[[], None]:
    """Plan in windows of 20 shards, and make all rows of all steps as a trainer gets them."""
    num_shards = -(-num_samples // PER_SHARD)
    shards = Shards([PER_SHARD] * num_shards, [SHARD_BYTES] * num_shards, 20 * SHARD_BYTES)
    mix = _lengths(0, PER_SHARD)
    measures = ShardMeasures(mix.num_tokens, mix.num_crops)

    def run() -> None:
        steps = plan_shards(
            shards,
            lambda _: measures,
            seed=0,
            epoch=0,
            global_batch_size=global_batch,
            world_size=world,
            max_tokens_per_row=CAPACITY,
        )
        assert sum(len(step.samples) for step in steps) == num_shards * PER_SHARD

    return run


WAYS: dict[str, Way] = {
    "plan and summary": plan_all,
    "shard by shard, rows of all steps": plan_by_shard,
}


def measure_here(what: str, num_samples: int, global_batch: int, world: int) -> Cost:
    """Run one way in this process."""
    run = WAYS[what](num_samples, global_batch, world)
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return Cost(what, num_samples, cpu, wall, _peak_bytes())


def measure_cost(what: str, num_samples: int, global_batch: int, world: int) -> Cost:
    """Run one way in a fresh process, on one core."""
    child = subprocess.run(
        [
            *(sys.executable, __file__, "--child", what, "--samples", str(num_samples)),
            *("--batch", str(global_batch), "--world", str(world)),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=1800,
    )
    return Cost(**json.loads(child.stdout))


def _peak_bytes() -> int:
    """`VmHWM` of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM: this needs Linux")


@click.command()
@click.option("--samples", default=10_000_000, show_default=True, help="of the first table")
@click.option("--batch", default=64, show_default=True, help="of the first table")
@click.option("--world", default=8, show_default=True, help="of the first table")
@click.option("--mix_samples", default=30_000, show_default=True, help="of the second table")
@click.option("--shards", default=1600, show_default=True, help="of the third table")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="write numbers here")
@click.option("--child", type=click.Choice(list(WAYS)), hidden=True)
def main(
    samples: int,
    batch: int,
    world: int,
    mix_samples: int,
    shards: int,
    json_file: Path | None,
    child: str | None,
) -> None:
    """Print three tables; exit status 1 where a claim does not hold."""
    if child:
        click.echo(json.dumps(asdict(measure_here(child, samples, batch, world))))
        return
    click.echo(COST_HEAD)
    costs: list[Cost] = []
    for what in WAYS:
        costs.append(measure_cost(what, samples, batch, world))
        click.echo(costs[-1].line())
    click.echo(f"\n{PACKING_HEAD}")
    rows: list[Packing] = []
    for row in packings(mix_samples):
        rows.append(row)
        click.echo(row.line())
    click.echo(f"\n{MIXING_HEAD}")
    orders: list[Mixing] = []
    for order in mixings(shards):
        orders.append(order)
        click.echo(order.line())
    if json_file is not None:
        content = {
            "costs": [asdict(cost) for cost in costs],
            "packings": [asdict(row) for row in rows],
            "mixings": [asdict(order) for order in orders],
            "python": platform.python_version(),
            "numpy": importlib.metadata.version("numpy"),
            "num_cpus": os.cpu_count(),
        }
        json_file.write_text(json.dumps(content, indent=2) + "\n")
    longest = LIMIT_SECONDS * samples / 10_000_000
    broken = [
        *(f"{c.what}: too slow" for c in costs[:1] if c.cpu_seconds > longest),
        *(f"{c.what}: too large" for c in costs if c.peak_bytes > LIMIT_BYTES),
        *(f"too many rows: {r.line()}" for r in rows if r.run > LIMIT_ROWS * r.offline_equal),
        *(f"uneven: {r.line()}" for r in rows if r.balance < LIMIT_BALANCE),
    ]
    if broken:
        sys.exit("\n".join(broken))


if __name__ == "__main__":
    main()
