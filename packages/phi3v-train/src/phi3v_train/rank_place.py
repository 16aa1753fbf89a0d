"""Who this process is among those of a run: by torchrun's variables, or by Slurm's.

    torchrun     RANK=5  WORLD_SIZE=8  LOCAL_RANK=1  MASTER_ADDR=…  MASTER_PORT=…
    srun         SLURM_PROCID=5  SLURM_NTASKS=8  SLURM_LOCALID=1    MASTER_ADDR=…
    neither      the only one

torchrun's come first: torchrun may itself run under Slurm. Under `srun` on one machine no address
is needed; over several, MASTER_ADDR names that of the first. Imports nothing of torch, so that a
command line is checked at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")


@dataclass(frozen=True, slots=True)
class RankPlace:
    """One process among all of a run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Among the processes of this machine."""
    launcher: str | None = None
    """Who started them: `torchrun` or `Slurm`; None: there are no others."""
    rendezvous: dict[str, str] = field(default_factory=dict[str, str])
    """Variables that torch needs and that the launcher did not set."""

    def device_index(self, num_devices: int) -> int:
        """Which of the devices that this process sees is its own.

        Slurm may show each task its own device alone (`--gpus-per-task=1`): then it is that.

        Raises:
            ValueError: there are more processes on this machine than devices.
        """
        if self.launcher == "Slurm" and num_devices == 1:
            return 0  # tasks that shared it would be refused by NCCL
        if self.local_rank >= num_devices:
            raise ValueError(
                f"process {self.local_rank} of this machine has no CUDA device: torch sees "
                f"{num_devices}; start fewer processes, or use device=cpu"
            )
        return self.local_rank


def rank_place(environment: Mapping[str, str]) -> RankPlace:
    """Read who we are.

    Raises:
        ValueError: a number that is none or out of range, or processes on several machines and no
            word of where they meet.
    """
    if all(name in environment for name in TORCHRUN):
        return RankPlace(*_numbers(environment, TORCHRUN), "torchrun")
    if not all(name in environment for name in SLURM):
        return RankPlace()
    rank, world_size, local_rank = _numbers(environment, SLURM)
    if world_size == 1:
        return RankPlace()
    rendezvous: dict[str, str] = {}
    if "MASTER_ADDR" not in environment:
        if environment.get("SLURM_NNODES", "1") != "1":
            raise ValueError(
                f"{environment['SLURM_NNODES']} machines of Slurm and no MASTER_ADDR; set it to "
                "the first one's name: "
                "export MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1)"
            )
        rendezvous["MASTER_ADDR"] = "127.0.0.1"
    if "MASTER_PORT" not in environment:
        # Jobs that share a machine must not meet: their numbers differ.
        rendezvous["MASTER_PORT"] = str(20_000 + int(environment.get("SLURM_JOB_ID", "0")) % 10_000)
    return RankPlace(rank, world_size, local_rank, "Slurm", rendezvous)


def _numbers(environment: Mapping[str, str], names: tuple[str, str, str]) -> tuple[int, int, int]:
    try:
        rank, world_size, local_rank = (int(environment[name]) for name in names)
    except ValueError:
        told = ", ".join(f"{name}={environment[name]}" for name in names)
        raise ValueError(f"expected whole numbers in the environment, got {told}") from None
    if not (0 <= rank < world_size and 0 <= local_rank):
        raise ValueError(
            f"{names[0]}={rank} is not one of the {world_size} processes of {names[1]}; start all "
            "of them with one launcher"
        )
    return rank, world_size, local_rank
