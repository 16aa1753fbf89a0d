"""An engine in one process trains as one device does; for two see test_engine_groups.py."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from phi3v_train.config import MethodConfig, ParallelConfig
from phi3v_train.engine import Engine, World, join_world
from phi3v_train.engine_choice import make_engine
from phi3v_train.methods import prepare
from phi3v_train.trainer import train
from torch import Tensor, nn

from tests.train.builders import losses_of, toy_config, weights_of
from tests.train.small_models import Prompt, packed_row, small_model

ROWS = [packed_row(Prompt(9)), packed_row(Prompt(12, ((1, 1),), seed=2))]
FSDP2 = ParallelConfig(engine="fsdp2")


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


def test_zero_of_one_process_trains_as_the_whole_model_does_and_again_in_another_group() -> None:
    expected = one_step(engine_of(ParallelConfig(engine="single")))
    for engine in ("zero2", "zero3"):
        found = engine_of(ParallelConfig.model_validate({"engine": engine}))
        losses, norm = one_step(found)
        found.world.leave()
        assert losses == pytest.approx(expected[0], abs=1e-5)
        assert norm == pytest.approx(expected[1], abs=1e-4)


def test_a_group_that_is_there_is_joined_and_left_to_its_maker(alone: World) -> None:
    alone.join_group()
    guest = join_world("cpu")
    assert (guest.rank, guest.world_size) == (0, 1)
    guest.leave()
    assert dist.is_initialized()
    alone.leave()
    assert not dist.is_initialized()


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
