"""One device, DDP, FSDP2 and ZeRO train alike: same data, same seed, same losses and weights."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from phi3v_train.config import MethodConfig, ParallelConfig
from phi3v_train.engine import Engine, World
from phi3v_train.engine_choice import make_engine
from phi3v_train.methods import prepare
from phi3v_train.trainer import train
from torch import Tensor, nn

from tests.train.builders import losses_of, toy_config, toy_overrides, weights_of
from tests.train.small_models import Prompt, packed_row, small_model

ROWS = [packed_row(Prompt(9)), packed_row(Prompt(12, ((1, 1),), seed=2))]
FSDP2 = ParallelConfig(engine="fsdp2")
TWENTY = ("train.max_steps=20", "data.max_tokens_per_row=2000")


def engine_of(parallel: ParallelConfig, *, forgotten: bool = False) -> Engine:
    model = small_model()
    if forgotten:
        model.register_parameter("forgotten", nn.Parameter(torch.zeros(2)))
    return make_engine(
        parallel,
        prepare(model, MethodConfig(), "fp32"),
        World(0, 1, torch.device("cpu")),
        lambda trainable: torch.optim.AdamW(trainable.values(), lr=1e-2),
        max_grad_norm=1.0,
    )


def one_step(engine: Engine) -> tuple[list[float], float]:
    losses: list[float] = []
    for number, row in enumerate(ROWS):
        is_last = number == len(ROWS) - 1
        loss = engine.loss_sum(row, is_last=is_last)
        engine.backward(loss / 8, is_last=is_last)
        losses.append(float(loss.detach()))
    assert engine.without_gradient() == []
    return losses, engine.step()


@pytest.fixture
def alone() -> Iterator[World]:
    """Leaves the group that a lone process made for its engine."""
    world = World(0, 1, torch.device("cpu"))
    yield world
    world.leave()


@pytest.mark.usefixtures("alone")
def test_shares_of_one_process_train_as_the_whole_model_does(tmp_path: Path) -> None:
    whole, shares = engine_of(ParallelConfig(engine="single")), engine_of(FSDP2)
    for _ in range(3):
        (losses, norm), (expected, expected_norm) = one_step(shares), one_step(whole)
        assert losses == pytest.approx(expected, abs=1e-5)
        assert norm == pytest.approx(expected_norm, abs=1e-4)
    found = dict(shares.whole().model.named_parameters())
    for name, weight in whole.training.model.named_parameters():
        assert torch.allclose(found[name], weight, atol=1e-5), name


@pytest.mark.usefixtures("alone")
def test_what_shares_wrote_one_device_reads_and_goes_on_with(tmp_path: Path) -> None:
    shares = engine_of(FSDP2)
    one_step(shares)
    shares.save(tmp_path)
    whole = engine_of(ParallelConfig(engine="single"))
    whole.load(tmp_path)
    (losses, _), (expected, _) = one_step(whole), one_step(shares)
    assert losses == pytest.approx(expected, abs=1e-5)
    (losses, _), (expected, _) = one_step(whole), one_step(shares)
    assert losses == pytest.approx(expected, abs=1e-5)


@pytest.mark.usefixtures("alone")
def test_shares_name_the_tensor_that_got_no_gradient() -> None:
    engine = engine_of(FSDP2, forgotten=True)
    engine.backward(engine.loss_sum(ROWS[1], is_last=True), is_last=True)
    assert engine.without_gradient() == ["forgotten"]


@pytest.mark.usefixtures("alone")
def test_a_whole_copy_in_another_dtype_answers_like_the_model() -> None:
    engine = engine_of(FSDP2)
    copy = engine.whole(torch.bfloat16).model
    assert {weight.dtype for weight in copy.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        expected = small_model().packed_loss(ROWS[1])
        assert float(copy.packed_loss(ROWS[1])) == pytest.approx(float(expected), rel=0.05)
    assert all(weight.dtype == torch.float32 for weight in engine.training.model.parameters())


@pytest.mark.usefixtures("alone")
def test_offloaded_shares_train_alike() -> None:
    both = ParallelConfig(engine="fsdp2", offload_optimizer=True, offload_parameters=True)
    assert one_step(engine_of(both))[0] == pytest.approx(one_step(engine_of(FSDP2))[0], abs=1e-6)


def test_a_run_in_shares_ends_with_the_same_model(
    tiny: Path, toy_shards: Path, tmp_path: Path
) -> None:
    evaluation = (f"data.eval={toy_shards}", "eval.limit=2", "eval.max_new_tokens=2")
    for name, engine in (("one", "single"), ("shares", "fsdp2")):
        config = toy_config(
            tiny, toy_shards, tmp_path / name, f"parallel.engine={engine}", *evaluation
        )
        assert train(config).step == 6
    assert losses_of(tmp_path / "shares") == pytest.approx(losses_of(tmp_path / "one"), abs=1e-5)
    assert_close(weights_of(tmp_path / "shares"), weights_of(tmp_path / "one"))


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name].float(), tensor.float(), atol=1e-3), name


# --- two processes --------------------------------------------------------------------------------


def run_group(folder: Path, overrides: list[str], timeout: int) -> str:
    """Train in two processes; what they said."""
    (folder / "run.json").write_text(json.dumps(overrides))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *("-m", "tests.train.engine_run", str(folder / "run.json")),
    ]
    group = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, cwd=Path(__file__).parents[2]
    )
    assert group.returncode == 0, group.stdout + group.stderr
    return group.stdout


@pytest.fixture(scope="module")
def expected(tiny: Path, toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Twenty losses of one process; rows of text only are among those with images."""
    output = tmp_path_factory.mktemp("runs") / "one"
    train(toy_config(tiny, toy_shards, output, *TWENTY))
    return losses_of(output)


def assert_same_losses(output_dir: Path, expected: list[float]) -> None:
    assert len(expected) == 20
    assert losses_of(output_dir) == pytest.approx(expected, abs=1e-5), output_dir.name


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("tokens", [800, 2000])  # a sample or two a row, accumulated; all in a row
def test_two_processes_give_the_losses_of_one_whatever_the_packing(
    tiny: Path, toy_shards: Path, tmp_path: Path, expected: list[float], engine: str, tokens: int
) -> None:
    options = (f"parallel.engine={engine}", *TWENTY, f"data.max_tokens_per_row={tokens}")
    run_group(tmp_path, toy_overrides(tiny, toy_shards, tmp_path / "two", *options), timeout=300)
    assert_same_losses(tmp_path / "two", expected)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    "parallel",
    [
        "{engine: zero1}",
        "{engine: zero2}",
        "{engine: zero2, offload_optimizer: true}",
        "{engine: zero3}",
        "{engine: zero3, offload_optimizer: true, offload_parameters: true}",
        "{engine: fsdp2, offload_optimizer: true, offload_parameters: true}",
    ],
)
def test_zero_and_offloading_of_two_processes_give_the_losses_of_one(
    tiny: Path, toy_shards: Path, tmp_path: Path, expected: list[float], parallel: str
) -> None:
    options = (f"parallel={parallel}", *TWENTY)
    run_group(tmp_path, toy_overrides(tiny, toy_shards, tmp_path / "two", *options), timeout=300)
    assert_same_losses(tmp_path / "two", expected)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize(
    "method", ["{name: lora}", "{freeze: [vision]}", "{gradient_checkpointing: true}"]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_method_trains_on_every_engine_in_two_processes(
    tiny: Path, toy_shards: Path, tmp_path: Path, engine: str, method: str, precision: str
) -> None:
    options = (
        f"parallel.engine={engine}",
        f"method={method}",
        f"precision={precision}",
        "train.num_epochs=10",
        "optim.learning_rate=3e-3",
    )
    run_group(tmp_path, toy_overrides(tiny, toy_shards, tmp_path / "two", *options), timeout=300)
    losses = losses_of(tmp_path / "two")
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_goes_on_from_its_checkpoint_where_it_stopped(
    tiny: Path, toy_shards: Path, tmp_path: Path, stage: int
) -> None:
    options = (f"parallel.engine=zero{stage}", "checkpoint.every_steps=2", "checkpoint.keep=9")
    run = toy_overrides(tiny, toy_shards, tmp_path / "run", *options)
    run_group(tmp_path, run, timeout=300)
    whole = weights_of(tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "latest").write_text("step-00000002\n")
    assert "going on from step-00000002" in run_group(tmp_path, run, timeout=300)
    assert_close(weights_of(tmp_path / "run"), whole)
