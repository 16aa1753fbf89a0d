"""Convert items as tasks of Ray, on this machine or a cluster. The only import of Ray.

    for outcome in run_ray(task, items, num_workers=64, address="auto"):     # in any order
        ...

Every machine of the cluster needs phi3v-data, the converter's module, and the source under the same
path (a shared file system); a source at an address is copied to each.
"""

import os
from collections.abc import Generator, Iterable
from typing import Any, cast

from phi3v_data.conversion.item_task import ItemTask, Outcome, died
from phi3v_data.converters import Item

WINDOW = 4
"""Items a worker that are under way: enough to keep all busy, few to hold or do again."""

NUM_RETRIES = 3
"""A worker that is lost (its machine went away) costs time; one that its item kills, the item."""


def run_ray(
    task: ItemTask, items: Iterable[Item], num_workers: int, address: str | None
) -> Generator[Outcome, None, None]:
    """Yield the outcomes as they come, in any order.

    Args:
        task: what to do with an item.
        items: taken when a worker is free, not before.
        num_workers: CPUs of a Ray of one's own; a cluster that is there has its own number.
        address: the cluster; None: that of `RAY_ADDRESS`, or else a Ray of one's own.

    Raises:
        OSError, MemoryError: the machine's trouble, of a worker.
        ValueError: Ray is not installed, or there is no such cluster.
    """
    ray = _import_ray()
    is_ours = not ray.is_initialized()
    if is_ours:
        _start(ray, num_workers, address)
    try:
        run_one = ray.remote(_run_one).options(max_retries=NUM_RETRIES, num_cpus=1)
        shared = ray.put(task)
        running: dict[Any, Item] = {}
        waiting, is_more = iter(items), True
        window = WINDOW * max(1, int(ray.cluster_resources().get("CPU", num_workers)))
        while is_more or running:
            while is_more and len(running) < window:
                item = next(waiting, None)
                if item is None:
                    is_more = False
                else:
                    running[run_one.remote(shared, item)] = item
            if running:
                done, _ = ray.wait(list(running), num_returns=1)
                yield _outcome(ray, done[0], running.pop(done[0]))
    finally:
        if is_ours:
            ray.shutdown()


def _run_one(task: ItemTask, item: Item) -> Outcome:
    return task(item)


def _outcome(ray: Any, reference: Any, item: Item) -> Outcome:
    try:
        return ray.get(reference)
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
        return died(item)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, BaseException):
            raise cause from error
        raise


def _import_ray() -> Any:
    # Ray would start its workers through `uv run` where it is run so: minutes, and other packages.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray  # pyright: ignore[reportMissingTypeStubs]
    except ImportError as error:
        raise ValueError(
            "engine=ray needs Ray: pip install 'phi3v-data[ray]' (or use engine=local)"
        ) from error
    return cast("Any", ray)


def _start(ray: Any, num_workers: int, address: str | None) -> None:
    quiet = {"log_to_driver": False, "include_dashboard": False, "logging_level": "error"}
    if address is None and "RAY_ADDRESS" not in os.environ:
        ray.init(num_cpus=num_workers, **quiet)
        return
    del quiet["include_dashboard"]  # a cluster that runs has decided
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ValueError(f"cannot reach a Ray cluster at {address}: {error}") from error
