import pytest
import torch
from phi3v_train.config import ConfigError, ParallelConfig, TrainConfig, load_config
from phi3v_train.configuration_phi3_v import Phi3VConfig
from phi3v_train.engine import World
from phi3v_train.engine_choice import choose_engine, describe_engine

GIB = 2**30


def config_of(*overrides: str) -> TrainConfig:
    return load_config(None, ["model=m", "output_dir=o", "data.train=d", *overrides])


def choice(num_gpus: int, gib: float | None, *overrides: str) -> ParallelConfig:
    world = World(0, num_gpus, torch.device("cuda", 0) if gib is not None else torch.device("cpu"))
    device_bytes = None if gib is None else int(gib * GIB)
    config = config_of("method.gradient_checkpointing=true", *overrides)
    return choose_engine(config, Phi3VConfig(), "bf16", world, device_bytes=device_bytes)


def test_adapters_are_never_shared_out() -> None:
    for method in ("lora", "qlora"):
        assert choice(1, 24, f"method.name={method}").engine == "single"
        assert choice(8, 24, f"method.name={method}").engine == "ddp"


def test_full_training_gets_the_first_engine_that_fits() -> None:
    assert choice(8, 1000).engine == "ddp"
    assert choice(1, 1000).engine == "single"
    assert choice(8, 60).engine == "fsdp2"


def test_what_does_not_fit_is_offloaded_the_optimizer_first() -> None:
    order = [choice(1, gib) for gib in (1000, 45, 2)]
    assert [parallel.engine for parallel in order] == ["single", "zero2", "zero3"]
    assert order[1].offload_optimizer
    assert order[2].offload_parameters


def test_cpus_share_nothing_out() -> None:
    assert choice(2, None).engine == "ddp"
    assert choice(1, None).engine == "single"


def test_a_wish_to_offload_names_an_engine_that_can() -> None:
    assert choice(2, 80, "parallel.offload_optimizer=true").engine == "zero2"
    assert choice(2, 80, "parallel.offload_parameters=true").engine == "zero3"


def test_an_engine_that_is_named_is_taken() -> None:
    assert choice(2, 1000, "parallel.engine=zero3").engine == "zero3"
    assert choice(1, 1000, "parallel.engine=fsdp2").engine == "fsdp2"
    assert choice(1, 1000, "parallel.engine=ddp").engine == "single"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["parallel.engine=single"], "trains on one device, got 2 processes"),
        (["parallel.engine=fsdp2", "method.name=qlora"], "use parallel.engine=ddp for method.name"),
        (["parallel.engine=zero2", "optim.name=adamw8bit"], "use optim.name=adamw, or parallel"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        choice(2, 80, *overrides)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("{engine: ddp, offload_optimizer: true}", "cannot offload_optimizer"),
        ("{engine: zero2, offload_parameters: true}", "needs engine zero3 or fsdp2"),
        ("{engine: fsdp2, offload_optimizer: true}", "together; set both"),
    ],
)
def test_an_engine_that_cannot_offload_is_refused(settings: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        config_of(f"parallel={settings}")


def test_an_engine_is_described_with_what_is_offloaded() -> None:
    both = ParallelConfig(engine="zero3", offload_optimizer=True, offload_parameters=True)
    assert describe_engine(both) == "zero3, parameters and optimizer in host memory"
    assert describe_engine(ParallelConfig(engine="ddp")) == "ddp"
