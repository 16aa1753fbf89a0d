import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from phi3v_train.config import ConfigError, load_config
from phi3v_train.launch import (
    Crew,
    check_crew,
    launch,
    run_forwarding_signals,
    torchrun_command,
    worker_environment,
)

REQUIRED = ("model=m", "output_dir=o", "data.train=d")
SLURM = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}


@pytest.fixture
def config():
    return load_config(None, REQUIRED)


def test_one_process_trains_here(config):
    assert check_crew(config, {}) is None
    assert check_crew(config, {}, nproc=1) is None
    assert check_crew(config, TORCHRUN) is None
    assert check_crew(config, SLURM) is None


def test_more_processes_are_started_with_torchrun(config):
    assert check_crew(config, {}, nproc=2) == Crew(2)
    command = torchrun_command(
        Crew(2), "a.yaml", ["seed=1", "optim.betas=[0.9, 0.99]"], ["--resume"]
    )
    assert command[:4] == [sys.executable, "-m", "phi3v_train.elastic", "--standalone"]
    assert "--nproc_per_node=2" in command
    assert command[-8:] == [
        "-m", "phi3v_train.cli", "launch", "--resume", "--",
        "a.yaml", "seed=1", "optim.betas=[0.9, 0.99]",
    ]  # fmt: skip


def test_a_single_process_that_may_be_started_again_is_started_with_torchrun_too(config):
    assert check_crew(config, {}, max_restarts=3) == Crew(1)
    assert check_crew(config, SLURM, nproc=8, nnodes=2, rdzv_endpoint="h:1", max_restarts=3)


@pytest.mark.parametrize(
    ("environment", "way_out"),
    [(TORCHRUN, "give torchrun its own --max_restarts"), (SLURM, "start one task per machine")],
)
def test_restarts_of_what_another_launcher_started_are_refused(config, environment, way_out):
    with pytest.raises(ConfigError, match=f"--max_restarts 3 inside .*; {way_out}"):
        check_crew(config, environment, max_restarts=3)


def test_without_a_file_only_the_overrides_are_passed_on():
    assert torchrun_command(Crew(2), None, ["a=1"])[-3:] == ["launch", "--", "a=1"]


def test_nproc_under_torchrun_is_refused(config):
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=2\); leave --nproc out"):
        check_crew(config, TORCHRUN, nproc=4)


def test_more_processes_than_samples_in_a_step_are_refused(config):
    with pytest.raises(ConfigError, match=r"raise train\.global_batch_size to at least 17"):
        check_crew(config, {}, nproc=17)


def test_tasks_of_slurm_that_outnumber_the_samples_of_a_step_are_refused_too(config):
    with pytest.raises(ConfigError, match=r"raise train\.global_batch_size to at least 40"):
        check_crew(config, {**SLURM, "SLURM_NTASKS": "40"})


def test_many_machines_meet_where_they_are_told(config):
    crew = check_crew(config, {}, nproc=8, nnodes=2, node_rank=1, rdzv_endpoint="host0:29400")
    assert crew == Crew(8, 2, 1, "host0:29400")
    assert crew is not None
    assert crew.world_size == 16
    command = torchrun_command(crew, "a.yaml", [])
    assert "--standalone" not in command
    for option in ("--nnodes=2", "--rdzv_endpoint=host0:29400", "--rdzv_conf=is_host=0"):
        assert option in command
    first = torchrun_command(Crew(8, 2, 0, "host0:29400"), "a.yaml", [])
    assert "--rdzv_conf=is_host=1" in first


@pytest.mark.parametrize(
    ("wishes", "told"),
    [
        ({"node_rank": 0}, "are for many machines; add --nnodes"),
        ({"rdzv_endpoint": "h:1"}, "are for many machines; add --nnodes"),
        ({"nnodes": 2}, "--nnodes 2 needs --rdzv_endpoint HOST:PORT"),
        ({"nnodes": 2, "rdzv_endpoint": "host0"}, "expected HOST:PORT, got 'host0'"),
        ({"nnodes": 2, "rdzv_endpoint": "host0:p"}, "expected HOST:PORT, got 'host0:p'"),
        ({"nnodes": 2, "rdzv_endpoint": "h:1", "node_rank": 2}, "numbered 0 to 1"),
    ],
)
def test_wishes_that_contradict_each_other_are_refused(config, wishes, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        check_crew(config, {}, **wishes)


def test_many_machines_inside_another_launcher_are_refused(config):
    wishes = {"nproc": 2, "rdzv_endpoint": "h:1"}
    with pytest.raises(ConfigError, match=r"torchrun started \(WORLD_SIZE=2\); leave --nnodes out"):
        check_crew(config, TORCHRUN, nnodes=2, **wishes)
    with pytest.raises(ConfigError, match=r"Slurm started \(SLURM_NTASKS=2\); leave --nnodes out"):
        check_crew(config, SLURM, nnodes=4, **wishes)


def test_a_task_of_slurm_on_each_machine_may_start_the_processes_there(config):
    crew = check_crew(config, SLURM, nproc=8, nnodes=2, rdzv_endpoint="h:1")
    assert crew == Crew(8, 2, None, "h:1")


def test_a_wrong_configuration_is_refused_before_anything_starts():
    with pytest.raises(ConfigError, match="missing key 'data'"):
        launch(None, ["model=m", "output_dir=o"], nproc=2)


def test_processes_share_the_cores_unless_told_otherwise():
    cores = len(os.sched_getaffinity(0))
    assert worker_environment({}, 1)["OMP_NUM_THREADS"] == str(cores)
    assert worker_environment({}, 10_000)["OMP_NUM_THREADS"] == "1"
    assert worker_environment({"OMP_NUM_THREADS": "3"}, 1)["OMP_NUM_THREADS"] == "3"


def test_processes_get_ten_minutes_to_save_unless_told_otherwise():
    name = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
    assert worker_environment({}, 2)[name] == "600"
    assert worker_environment({name: "60"}, 2)[name] == "60"


@pytest.mark.parametrize("status", [0, 1, 3])
def test_the_exit_status_is_passed_through(status):
    command = [sys.executable, "-c", f"raise SystemExit({status})"]
    assert run_forwarding_signals(command, os.environ) == status


def test_a_command_killed_by_a_signal_ends_as_in_a_shell():
    command = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    assert run_forwarding_signals(command, os.environ) == 128 + 9


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_the_command_which_may_finish_its_work(tmp_path, number):
    ready, done = tmp_path / "ready", tmp_path / "done"
    child = (
        "import pathlib, signal\n"
        f"signal.pthread_sigmask(signal.SIG_BLOCK, [{int(number)}])\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        f"got = signal.sigwait([{int(number)}])\n"
        f"pathlib.Path({str(done)!r}).write_text(str(int(got)))\n"
    )

    def interrupt():
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    before = signal.getsignal(number)
    status = run_forwarding_signals([sys.executable, "-c", child], os.environ)
    thread.join()
    assert status == 128 + number
    assert done.read_text() == str(int(number))
    assert signal.getsignal(number) is before


def test_checking_a_configuration_loads_neither_torch_nor_transformers():
    program = (
        "import sys\n"
        "from phi3v_train.config import ConfigError\n"
        "from phi3v_train.launch import launch\n"
        "try:\n"
        "    launch(None, ['modl=m'])\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & sys.modules.keys()))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines() == [
        "unknown key 'modl' in override 'modl=m'; did you mean 'model'?",
        "[]",
    ]
