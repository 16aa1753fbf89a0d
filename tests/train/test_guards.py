from pathlib import Path

import pytest
import torch
from phi3v_train.config import MethodConfig
from phi3v_train.engine import World
from phi3v_train.guards import explain_non_finite, first_non_finite, guard_gradients
from phi3v_train.methods import prepare
from phi3v_train.modeling_phi3_v import Phi3VForCausalLM
from phi3v_train.replicated_engine import ReplicatedEngine
from phi3v_train.trainer import train
from safetensors.torch import load_file, save_file
from torch import nn

from tests.train.builders import toy_config
from tests.train.small_models import Prompt, packed_row, small_model

ROWS = [packed_row(Prompt(9)), packed_row(Prompt(12, ((1, 1),), seed=2))]


def engine_of(model: Phi3VForCausalLM) -> ReplicatedEngine:
    world = World(0, 1, torch.device("cpu"))
    return ReplicatedEngine(
        prepare(model, MethodConfig(), "fp32"),
        world,
        lambda trainable: torch.optim.AdamW(trainable.values()),
        max_grad_norm=1.0,
    )


def no_seed(_: int) -> None:
    """There is no dropout."""


def test_a_trainable_tensor_without_a_gradient_is_named() -> None:
    model = small_model()
    model.register_parameter("forgotten", nn.Parameter(torch.zeros(2)))
    engine = engine_of(model)
    engine.backward(engine.loss_sum(ROWS[1], is_last=True), is_last=True)
    with pytest.raises(ValueError, match=r"1 of \d+ trainable tensors got no .*: forgotten;"):
        guard_gradients(engine)


def test_a_row_of_text_gives_every_tensor_a_gradient() -> None:
    engine = engine_of(small_model().train())
    engine.backward(engine.loss_sum(ROWS[0], is_last=True), is_last=True)
    guard_gradients(engine)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.down_proj",
        "model.vision_embed_tokens.img_processor.vision_model.encoder.layers.0.self_attn.k_proj",
        "lm_head",
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_module_that_gives_no_number_is_named(name: str, value: float) -> None:
    model = small_model()
    with torch.no_grad():
        model.get_submodule(name).get_parameter("weight")[0, 0] = value
    engine = engine_of(model)
    assert first_non_finite(engine, ROWS[1]) == name
    assert first_non_finite(engine_of(small_model()), ROWS[1]) is None


def test_a_loss_that_is_no_number_names_step_rank_samples_and_module() -> None:
    model = small_model()
    with torch.no_grad():
        model.model.layers[0].get_parameter("mlp.gate_up_proj.weight")[0, 0] = float("nan")
    losses = [torch.tensor(1.0), torch.tensor(float("nan"))]
    told = explain_non_finite(engine_of(model), ROWS, losses, step=6, reseed=no_seed)
    assert "\n" not in told
    for part in (
        "step 7, rank 0",
        "the loss is nan on samples prompt 0",
        "is model.layers.0.mlp.gate_up_proj",
    ):
        assert part in told


def test_losses_whose_sum_overflows_are_told_as_that() -> None:
    losses = [torch.tensor(3e38), torch.tensor(3e38)]
    told = explain_non_finite(engine_of(small_model()), ROWS, losses, step=0, reseed=no_seed)
    assert "step 1: the sum of the losses overflows" in told


def test_a_run_of_weights_that_are_no_numbers_stops_in_the_first_step(
    tiny: Path, toy_shards: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in tiny.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = load_file(tiny / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"step 1, rank 0: .* on samples s\d+.* is model\.norm;"):
        train(toy_config(broken, toy_shards, tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_samples_longer_than_a_row_are_listed_before_the_first_step(
    tiny: Path, toy_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = "data.max_tokens_per_row=400"
    with pytest.raises(ValueError, match=r"4 of 12 samples are longer .*\(s2: \d+ tokens, s5:"):
        train(toy_config(tiny, toy_shards, tmp_path, short))
    drop = ("data.overlong=drop", "train.max_steps=1")
    assert train(toy_config(tiny, toy_shards, tmp_path, short, *drop)).step == 1
    assert "4 too long for a row: s2: " in capsys.readouterr().out
