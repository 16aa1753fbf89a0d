import pytest
from phi3v_train.rank_place import RankPlace, rank_place

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}


def test_without_a_launcher_a_process_is_the_only_one() -> None:
    assert rank_place({}) == RankPlace(0, 1, 0)
    assert rank_place({"RANK": "3"}) == RankPlace(0, 1, 0)


def test_torchrun_says_who_we_are() -> None:
    assert rank_place(TORCHRUN) == RankPlace(5, 8, 1, "torchrun")


def test_torchrun_under_slurm_comes_first() -> None:
    assert rank_place({**SLURM, **TORCHRUN}) == RankPlace(5, 8, 1, "torchrun")


def test_slurm_says_who_we_are_and_where_to_meet() -> None:
    place = rank_place({**SLURM, "SLURM_JOB_ID": "1234567"})
    assert (place.rank, place.world_size, place.local_rank) == (3, 4, 1)
    assert place.launcher == "Slurm"
    assert place.rendezvous == {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "24567"}


def test_an_address_that_is_set_is_kept() -> None:
    place = rank_place({**SLURM, "MASTER_ADDR": "a", "MASTER_PORT": "1", "SLURM_NNODES": "2"})
    assert place.rendezvous == {}


def test_several_machines_of_slurm_without_an_address_are_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="2 machines of Slurm and no MASTER_ADDR; set it to"):
        rank_place({**SLURM, "SLURM_NNODES": "2"})


def test_one_task_of_slurm_is_a_process_like_any_other() -> None:
    one = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}
    assert rank_place(one) == RankPlace(0, 1, 0)


def test_a_process_takes_the_device_of_its_number_or_the_only_one_that_slurm_shows_it() -> None:
    torchrun, slurm = rank_place(TORCHRUN), rank_place(SLURM)
    assert torchrun.local_rank == slurm.local_rank == 1
    assert torchrun.device_index(2) == slurm.device_index(4) == 1
    assert slurm.device_index(1) == 0
    with pytest.raises(ValueError, match="process 1 of this machine has no CUDA device: torch see"):
        torchrun.device_index(1)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"RANK": "x"}, "expected whole numbers in the environment, got RANK=x, WORLD_SIZE=8"),
        ({"RANK": "8"}, "RANK=8 is not one of the 8 processes of WORLD_SIZE"),
        ({"WORLD_SIZE": "0"}, "RANK=5 is not one of the 0 processes"),
    ],
)
def test_an_environment_that_cannot_be_is_refused(changes: dict[str, str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        rank_place({**TORCHRUN, **changes})
