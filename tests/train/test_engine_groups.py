"""Two processes train as one does: same data, same seed, same losses, under every engine.

One process is the measure: its losses, of rows of 2,000 tokens. A group of two processes does many
runs one after another (`engine_run`), and a test looks at one of them.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from phi3v_train.trainer import train

from tests.train.builders import log_lines, losses_of, toy_config, toy_overrides, weights_of

pytestmark = pytest.mark.slow  # a group imports for many seconds before its first step

ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
ZERO = ("zero1", "zero2", "zero3")
Options = tuple[str, ...]

TWENTY: Options = ("train.max_steps=20", "data.max_tokens_per_row=2000")
SHORT_ROWS = "data.max_tokens_per_row=800"
"""A sample or two a row: several rows a step, some of text beside others with pictures."""
SAVES: Options = ("checkpoint.every_steps=18", "checkpoint.keep=9")

SIX: Options = ("train.max_steps=6", "data.max_tokens_per_row=2000", "optim.learning_rate=5e-3")
METHODS: dict[str, Options] = {
    "full": (),
    "lora": ("method.name=lora", "method.lora.dropout=0"),
    "frozen vision": ("method.freeze=[vision]",),
    "recomputed": ("method.gradient_checkpointing=true",),
    "vision in full": ("method.name=lora", "method.lora.full=[vision]", "optim.vision_lr=1e-3"),
    "rates by part": ("optim.vision_lr=1e-3", "optim.projector_lr=2e-3"),
}
QUICK = ("lora fp32", "full bf16")
OFFLOADED = {
    "zero2, moments offloaded": "{engine: zero2, offload_optimizer: true}",
    "zero3, all offloaded": "{engine: zero3, offload_optimizer: true, offload_parameters: true}",
    "fsdp2, all offloaded": "{engine: fsdp2, offload_optimizer: true, offload_parameters: true}",
}


def options_of(case: str) -> Options:
    """Of `lora fp32`."""
    method, _, precision = case.rpartition(" ")
    return (*SIX, *METHODS[method], f"precision={precision}")


@dataclass(frozen=True)
class Group:
    """What two processes did."""

    folder: Path
    told: Mapping[str, list[str | None]]
    """What each process raised, by the name of the run."""

    def output(self, name: str) -> Path:
        """A run's folder; it came to its end."""
        assert self.told[name] == [None, None]
        return self.folder / name


def run_group(
    tiny: Path,
    shards: Path,
    folder: Path,
    runs: Mapping[str, Options],
    *,
    goes_on: Mapping[str, str] | None = None,
    forgotten: tuple[str, ...] = (),
    timeout: int,
) -> Group:
    """Do all runs in one group; those in `goes_on` start at step 18 of another run."""
    file = folder / "run.json"
    sources = goes_on or {}
    asked = {
        "runs": {
            name: {
                "overrides": toy_overrides(tiny, shards, folder / name, *options),
                "goes_on_from": (
                    str(folder / sources[name] / "checkpoints" / "step-00000018")
                    if name in sources
                    else None
                ),
            }
            for name, options in runs.items()
        },
        "forgotten": {f"forgotten under {engine}": {"engine": engine} for engine in forgotten},
    }
    file.write_text(json.dumps(asked))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *("-m", "tests.train.engine_run", str(file)),
    ]
    group = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, cwd=Path(__file__).parents[2]
    )
    assert group.returncode == 0, group.stdout[-500:] + group.stderr[-4000:]
    return Group(folder, json.loads((folder / "told.json").read_text()))


Alone = Callable[[Options], Path]


@pytest.fixture(scope="module")
def alone(tiny: Path, toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """Trains in this process, once for the same options; the run's folder."""
    known: dict[Options, Path] = {}

    def run(options: Options) -> Path:
        if options not in known:
            output = tmp_path_factory.mktemp("alone") / "run"
            train(toy_config(tiny, toy_shards, output, *options))
            known[options] = output
        return known[options]

    return run


def assert_same_losses(found: Path, expected: Path, within: float = 1e-5) -> None:
    assert len(losses_of(expected)) in (6, 20)
    assert losses_of(found) == pytest.approx(losses_of(expected), abs=within), found.name


def assert_close_weights(found: Path, expected: Path, within: float) -> None:
    mine, others = weights_of(found), weights_of(expected)
    assert mine.keys() == others.keys()
    for name, tensor in others.items():
        assert torch.allclose(mine[name].float(), tensor.float(), atol=within), name


# --- the essential runs ---------------------------------------------------------------------------

WENT_ON = {
    **{f"{engine} goes on": f"{engine} fp32" for engine in ENGINES},
    "ddp goes on from fsdp2": "fsdp2 fp32",
    "fsdp2 goes on from ddp": "ddp fp32",
    "ddp goes on from zero2": "zero2 fp32",
    "zero2 goes on from fsdp2": "fsdp2 fp32",
    "zero1 goes on from zero2": "zero2 fp32",
    "zero2 goes on from zero1": "zero1 fp32",
    "zero2 goes on from zero3": "zero3 fp32",
    "zero3 goes on from zero2": "zero2 fp32",
}


@pytest.fixture(scope="module")
def group(tiny: Path, toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Group:
    """Twenty steps under every engine and what follows from them; LoRA and bf16 under every one."""
    twenty = (*TWENTY, SHORT_ROWS, *SAVES)
    runs: dict[str, Options] = {
        f"{engine} fp32": (f"parallel.engine={engine}", *twenty) for engine in ENGINES
    }
    for name in WENT_ON:
        runs[name] = (f"parallel.engine={name.split()[0]}", *twenty)
    for case in QUICK:
        for engine in ENGINES:
            runs[f"{engine} {case}"] = (f"parallel.engine={engine}", *options_of(case))
    runs["fsdp2 qlora"] = ("parallel.engine=fsdp2", "method.name=qlora", *SIX)
    runs["zero2 adamw8bit"] = ("parallel.engine=zero2", "optim.name=adamw8bit", *SIX)
    folder = tmp_path_factory.mktemp("group")
    return run_group(
        tiny, toy_shards, folder, runs, goes_on=WENT_ON, forgotten=ENGINES, timeout=900
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_twenty_steps_of_two_processes_have_the_losses_of_one(
    group: Group, alone: Alone, engine: str
) -> None:
    output = group.output(f"{engine} fp32")
    assert_same_losses(output, alone(TWENTY))
    assert_close_weights(output, alone(TWENTY), 1e-3)


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_of_text_ran_beside_rows_with_pictures(group: Group, engine: str) -> None:
    logs = [group.output(f"{engine} fp32") / "logs" / f"rank-{rank}.jsonl" for rank in (0, 1)]
    lines = [[json.loads(line) for line in log.read_text().splitlines()] for log in logs]
    steps = list(zip(*lines, strict=True))
    assert len(steps) == 20
    assert any(one["num_crops"] > 0 and other["num_crops"] == 0 for one, other in steps)
    assert any(one["num_rows"] > 1 for one, _ in steps)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(
    group: Group, engine: str
) -> None:
    whole, rest = group.output(f"{engine} fp32"), group.output(f"{engine} goes on")
    assert [line["step"] for line in log_lines(rest)] == [19, 20]
    assert losses_of(rest) == pytest.approx(losses_of(whole)[18:], abs=1e-6)
    assert_close_weights(rest, whole, 1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "ddp goes on from fsdp2",
        "fsdp2 goes on from ddp",
        "zero1 goes on from zero2",
        "zero2 goes on from zero1",
    ],
)
def test_engines_with_files_of_one_kind_go_on_from_each_other(group: Group, name: str) -> None:
    expected = losses_of(group.output(WENT_ON[name]))[18:]
    assert losses_of(group.output(name)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ddp goes on from zero2", "format deepspeed, and the engine of this run reads dcp"),
        ("zero2 goes on from fsdp2", "format dcp, and the engine of this run reads deepspeed"),
        ("zero3 goes on from zero2", "go on with parallel.engine=zero1 or zero2"),
        ("zero2 goes on from zero3", "go on with parallel.engine=zero3"),
    ],
)
def test_a_checkpoint_that_the_engine_cannot_read_is_refused(
    group: Group, name: str, told: str
) -> None:
    for said in group.told[name]:
        assert said is not None
        assert told in said
        assert "\n" not in said


@pytest.mark.parametrize("engine", ZERO)
def test_zero_in_another_number_of_processes_is_refused(
    group: Group, tiny: Path, toy_shards: Path, engine: str
) -> None:
    options = (f"parallel.engine={engine}", *TWENTY, SHORT_ROWS)
    config = toy_config(tiny, toy_shards, group.output(f"{engine} fp32"), *options)
    with pytest.raises(ValueError, match="were written by 2 processes, and 1 would read") as caught:
        train(config, resume=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_one_process_goes_on_from_two(
    group: Group, alone: Alone, tiny: Path, toy_shards: Path, tmp_path: Path, engine: str
) -> None:
    name = "step-00000018"
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.copytree(group.output(f"{engine} fp32") / "checkpoints" / name, checkpoints / name)
    (checkpoints / "latest").write_text(f"{name}\n")
    train(toy_config(tiny, toy_shards, tmp_path / "run", *TWENTY, SHORT_ROWS), resume=True)
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(alone(TWENTY))[18:], abs=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", QUICK)
def test_adapters_and_bf16_of_two_processes_have_the_losses_of_one(
    group: Group, alone: Alone, engine: str, case: str
) -> None:
    assert_alike(group.output(f"{engine} {case}"), alone, case)


def assert_alike(output: Path, alone: Alone, case: str) -> None:
    expected = alone(options_of(case))
    assert losses_of(expected)[-1] < 0.95 * losses_of(expected)[0]
    if case.endswith("fp32"):
        assert_same_losses(output, expected)
        assert_close_weights(output, expected, 5e-3)
    else:
        # Roundings to 8 bits of a product that is summed in another order.
        assert_same_losses(output, expected, within=0.01)
        fp32 = alone(options_of(case.replace("bf16", "fp32")))
        assert losses_of(output) != pytest.approx(losses_of(fp32), abs=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_parameter_that_nothing_uses_is_named_by_both_processes(
    group: Group, engine: str
) -> None:
    for said in group.told[f"forgotten under {engine}"]:
        assert said is not None
        assert "tensors got no gradient in the first step" in said
        assert ": forgotten; freeze them" in said


def test_what_cannot_be_shared_out_is_refused_by_both_processes(group: Group) -> None:
    for name, told in (
        ("fsdp2 qlora", "4-bit weights can't be; use parallel.engine=ddp"),
        ("zero2 adamw8bit", "use optim.name=adamw, or parallel.engine=ddp"),
    ):
        assert [told in str(said) for said in group.told[name]] == [True, True]


# --- all combinations -----------------------------------------------------------------------------

CASES = [
    case
    for case in (f"{method} {precision}" for method in METHODS for precision in ("fp32", "bf16"))
    if case not in (*QUICK, "full fp32")
]
UNDER_DDP: dict[str, Options] = {
    "qlora fp32": ("method.name=qlora", "method.lora.dropout=0"),
    "8-bit moments fp32": ("optim.name=adamw8bit",),
}


EVALUATED: Options = ("eval.every_steps=3", "eval.limit=5", "eval.max_new_tokens=2")


@pytest.fixture(scope="module")
def all_runs(tiny: Path, toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Group:
    """Every method under every engine in both precisions; what is offloaded; longer rows."""
    runs: dict[str, Options] = {
        f"{engine} {case}": (f"parallel.engine={engine}", *options_of(case))
        for case in CASES
        for engine in ENGINES
    }
    for name, options in UNDER_DDP.items():
        runs[f"ddp {name}"] = ("parallel.engine=ddp", *SIX, *options)
    for engine in ENGINES:
        runs[f"{engine}, long rows"] = (f"parallel.engine={engine}", *TWENTY)
        runs[f"{engine}, evaluated"] = (
            f"parallel.engine={engine}", *SIX, *EVALUATED, f"data.eval={toy_shards}",
        )  # fmt: skip
    for name, parallel in OFFLOADED.items():
        runs[name] = (f"parallel={parallel}", *TWENTY, *SAVES)
        runs[f"{name}, goes on"] = runs[name]
    goes_on = {f"{name}, goes on": name for name in OFFLOADED}
    folder = tmp_path_factory.mktemp("all")
    return run_group(tiny, toy_shards, folder, runs, goes_on=goes_on, timeout=3600)


@pytest.mark.long
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_every_method_under_every_engine_has_the_losses_of_one_process(
    all_runs: Group, alone: Alone, engine: str, case: str
) -> None:
    assert_alike(all_runs.output(f"{engine} {case}"), alone, case)


@pytest.mark.long
@pytest.mark.parametrize("name", UNDER_DDP)
def test_what_is_quantised_has_the_losses_of_one_process(
    all_runs: Group, alone: Alone, name: str
) -> None:
    expected = alone((*SIX, *UNDER_DDP[name]))
    assert losses_of(expected)[-1] < 0.95 * losses_of(expected)[0]
    assert_same_losses(all_runs.output(f"ddp {name}"), expected, within=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("engine", ENGINES)
def test_twenty_steps_of_one_row_each_have_the_losses_of_one_process(
    all_runs: Group, alone: Alone, engine: str
) -> None:
    assert_same_losses(all_runs.output(f"{engine}, long rows"), alone(TWENTY))


@pytest.mark.long
@pytest.mark.parametrize("name", OFFLOADED)
def test_twenty_steps_of_what_is_offloaded_have_the_losses_of_one_process(
    all_runs: Group, alone: Alone, name: str
) -> None:
    output = all_runs.output(name)
    assert_same_losses(output, alone(TWENTY))
    rest = all_runs.output(f"{name}, goes on")
    assert losses_of(rest) == pytest.approx(losses_of(output)[18:], abs=1e-6)
    assert_close_weights(rest, output, 1e-6)


@pytest.mark.long
@pytest.mark.parametrize("engine", ENGINES)
def test_evaluations_on_the_way_have_the_losses_of_one_process(
    all_runs: Group, alone: Alone, toy_shards: Path, engine: str
) -> None:
    expected = evaluation_losses(alone((*SIX, *EVALUATED, f"data.eval={toy_shards}")))
    found = evaluation_losses(all_runs.output(f"{engine}, evaluated"))
    assert len(expected) == 2
    assert found == pytest.approx(expected, abs=1e-5)
    assert (all_runs.output(f"{engine}, evaluated") / "eval_after.json").exists()


def evaluation_losses(output: Path) -> list[float]:
    lines = (output / "eval" / "history.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]
