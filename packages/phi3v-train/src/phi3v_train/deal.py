"""A step's samples dealt to ranks and packed there into rows, many steps at a time.

    lengths = [[700, 300, 500, 900]]                       # one step of four samples
    deal = deal_steps(lengths, costs=[[7, 3, 5, 9]], world_size=2, capacity=1000)
    deal.row                                               # [[1 0 1 0]]... see `Deal`

Every rank gets equally many rows, as few as the step can do with. It begins with a number of rows
that is certainly needed and tries three ways to fit the samples in, the most even one first:

1. dearest first, each to the rank that carries the least and has a row with room;
2. longest first, likewise;
3. longest first, each into the fullest row with room, of all ranks (best-fit decreasing); the rows
   then go to the ranks, dearest first, each to the one that carries the least.

In a rank a sample goes into the fullest row with room. Where all three fail there is one row more
for every rank. So no rank ever runs more rows than best-fit decreasing of the whole step, spread
over the ranks, would give it.

Only integers are compared, so every machine deals alike. All steps are dealt side by side: what is
a loop here is one over the samples of a step, and an operation in it one over the steps.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_NEVER = np.iinfo(np.int64).max

# Forward MFLOP of Phi-3.5-vision, in whole numbers so that every machine deals alike. Other sizes
# of the model keep about these proportions.
_MFLOP_PER_TOKEN = 7_249  # 2 x 3.624 G matmul weights
_MFLOP_PER_1000_TOKENS_SQUARED = 197  # causal attention: 32 layers x 2 x 3072 FLOP per pair
_MFLOP_PER_CROP = 372_700  # 23 CLIP layers on 577 tokens (366 G) and the projector


def sample_cost(num_tokens: Numbers, num_crops: Numbers) -> Numbers:
    """Forward cost of each sample in MFLOP; only the proportions matter."""
    return (
        _MFLOP_PER_TOKEN * num_tokens
        + num_tokens * num_tokens * _MFLOP_PER_1000_TOKENS_SQUARED // 1000
        + _MFLOP_PER_CROP * num_crops
    )


@dataclass(frozen=True, eq=False)
class Deal:
    """Where the samples of S steps of up to G samples went."""

    row: Numbers
    """(S, G): rank * rows_per_rank + row of the rank; -1 where a step has no such sample."""

    rows_per_rank: Numbers
    """(S,): rows that each rank runs, empty ones included; at least 1."""


def fewest_rows(lengths: Numbers, capacity: int) -> Numbers:
    """A number of rows that no packing can do without.

    Rows hold `capacity` tokens, and at most k samples longer than capacity / (k + 1).

    Args:
        lengths: (S, G), 0 where a step has no such sample.
        capacity: of a row.

    Returns:
        (S,), at least 1.
    """
    needed = -(-lengths.sum(axis=1) // capacity)
    for k in range(1, 8):
        longer = (lengths * (k + 1) > capacity).sum(axis=1)
        needed = np.maximum(needed, -(-longer // k))
    return np.maximum(needed, 1)


def deal_steps(lengths: Numbers, costs: Numbers, *, world_size: int, capacity: int) -> Deal:
    """Deal the samples of S steps; each step by itself.

    Args:
        lengths: tokens, (S, G), none over capacity; 0 where a step has fewer samples than others.
        costs: any unit, (S, G), positive.
        world_size: number of ranks.
        capacity: tokens of a row.
    """
    num_steps, most = lengths.shape
    row = np.full((num_steps, most), -1, np.int64)
    rows_per_rank = -(-fewest_rows(lengths, capacity) // world_size)
    # A missing sample goes last in both orders.
    dearest = np.argsort(np.where(lengths > 0, -costs, 1), axis=1, kind="stable")
    longest = np.argsort(-lengths, axis=1, kind="stable")
    pending = np.arange(num_steps)
    while len(pending):
        for order, way in ((dearest, _by_load), (longest, _by_load), (longest, _by_room)):
            columns = order[pending]
            table = _Table(
                lengths=np.ascontiguousarray(np.take_along_axis(lengths[pending], columns, 1).T),
                costs=np.ascontiguousarray(np.take_along_axis(costs[pending], columns, 1).T),
                rows_per_rank=rows_per_rank[pending],
                world_size=world_size,
                capacity=capacity,
            )
            found, fits = way(table)
            done = pending[fits]
            row[done[:, None], columns[fits]] = found.T[fits]
            pending = pending[~fits]
            if not len(pending):
                break
        rows_per_rank[pending] += 1
    row[lengths == 0] = -1
    return Deal(row, rows_per_rank)


@dataclass(frozen=True, eq=False)
class _Table:
    """What one attempt is made on. Steps are the last axis: they lie side by side in memory."""

    lengths: Numbers
    """(G, S), in the order in which they are dealt."""
    costs: Numbers
    """(G, S)."""
    rows_per_rank: Numbers
    """(S,)."""
    world_size: int
    capacity: int

    def room(self, num_rows: Numbers) -> Numbers:
        """(most rows, S): the capacity, and -1 (no sample fits) where a step has no such row."""
        exists = np.arange(num_rows.max())[:, None] < num_rows
        return np.where(exists, self.capacity, -1)


def _fullest(room: Numbers, lengths: Numbers) -> Numbers:
    """The fullest of several rows with room, the first of them; of room (R, S), for (S,)."""
    most = len(room)
    tagged = np.where(room >= lengths, room * most + np.arange(most)[:, None], _NEVER)
    best = tagged.min(axis=0)
    return np.where(best == _NEVER, -1, best % most)


def _by_load(table: _Table) -> tuple[Numbers, Flags]:
    """Each sample to the rank that carries the least and has a row with room: (G, S), fits."""
    world = table.world_size
    most, num_steps = table.lengths.shape
    steps = np.arange(num_steps)
    room = np.repeat(table.room(table.rows_per_rank)[:, None], world, axis=1)  # (R, W, S)
    widest = room.max(axis=0)  # (W, S): the most room in one row
    # Load and rank in one word: its least is the least loaded rank, the lowest of equals.
    load = np.repeat(np.arange(world)[:, None], num_steps, axis=1)  # (W, S)
    found = np.empty((most, num_steps), np.int64)
    fits = np.ones(num_steps, bool)
    for place, (lengths, costs) in enumerate(zip(table.lengths, table.costs, strict=True)):
        least = np.where(widest >= lengths, load, _NEVER).min(axis=0)
        rank = least % world
        if bool((least == _NEVER).any()):
            fits &= least != _NEVER
            rank[least == _NEVER] = 0
        of_rank = room[:, rank, steps]  # (R, S)
        row = _fullest(of_rank, lengths)
        of_rank[row, steps] -= lengths
        room[:, rank, steps] = of_rank
        widest[rank, steps] = of_rank.max(axis=0)
        load[rank, steps] += costs * world
        found[place] = rank * table.rows_per_rank + row
    return found, fits


def _by_room(table: _Table) -> tuple[Numbers, Flags]:
    """Each sample into the fullest row of all, then the rows to the ranks: (G, S), fits."""
    world = table.world_size
    most, num_steps = table.lengths.shape
    steps = np.arange(num_steps)
    room = table.room(table.rows_per_rank * world)  # (W * R, S)
    cost = np.where(room < 0, -1, 0)
    found = np.empty((most, num_steps), np.int64)
    fits = np.ones(num_steps, bool)
    for place, (lengths, costs) in enumerate(zip(table.lengths, table.costs, strict=True)):
        row = _fullest(room, lengths)
        fits &= row >= 0
        room[row, steps] -= lengths
        cost[row, steps] += costs
        found[place] = row
    dearest = np.argsort(-cost, axis=0, kind="stable")
    load = np.repeat(np.arange(world)[:, None], num_steps, axis=1)  # (W, S), as in `_by_load`
    taken = np.zeros((world, num_steps), np.int64)
    moved = np.empty_like(dearest)
    for rows in dearest:
        least = np.where(taken < table.rows_per_rank, load, _NEVER).min(axis=0)
        rank = np.where(least == _NEVER, 0, least % world)  # no rank: no such row in this step
        moved[rows, steps] = rank * table.rows_per_rank + taken[rank, steps]
        taken[rank, steps] += 1
        load[rank, steps] += cost[rows, steps] * world
    return np.take_along_axis(moved, found, axis=0), fits
