"""Checkpoints as folders that others load."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from phi3v_train.checkpoint import CheckpointError, read_state
from phi3v_train.cli import main
from phi3v_train.export import SIDE_FILES, check_export, export_model, tensor_names
from phi3v_train.export_checkpoint import export_checkpoint, find_checkpoint
from phi3v_train.lora import load_adapter
from phi3v_train.methods import load_model
from phi3v_train.probe import largest_difference, probe
from phi3v_train.trainer import train
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.train.builders import toy_config, weights_of


def run(tiny: Path, shards: Path, output: Path, *more: str) -> Path:
    quiet = ("log.report=false", "log.tensorboard=false")
    saving = ("checkpoint.every_steps=1", "checkpoint.keep=9")
    train(toy_config(tiny, shards, output, *saving, *quiet, *more))
    return output


@pytest.fixture(scope="module")
def full(tiny: Path, toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps with a checkpoint of each, measured after each."""
    output = tmp_path_factory.mktemp("runs") / "full"
    measured = (f"data.eval={toy_shards}", "eval.every_steps=1", "eval.limit=2", "eval.after=false")
    return run(tiny, toy_shards, output, "train.max_steps=3", *measured)


@pytest.fixture(scope="module")
def lora(tiny: Path, toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "lora"
    return run(tiny, toy_shards, output, "method.name=lora", "train.max_steps=2")


def saved(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_newest_checkpoint_of_a_run_is_what_the_run_wrote(
    tiny: Path, full: Path, tmp_path: Path
) -> None:
    exported = export_checkpoint(full, tmp_path / "out", check=True)
    assert (exported.step, exported.kind) == (3, "model")
    assert_equal(saved(exported.path), weights_of(full))
    assert tensor_names(exported.path) == tensor_names(tiny)
    for name in SIDE_FILES:
        if (tiny / name).exists():
            assert (exported.path / name).read_bytes() == (tiny / name).read_bytes()


def test_any_checkpoint_is_exported_by_its_folder(full: Path, tmp_path: Path) -> None:
    exported = export_checkpoint(full / "checkpoints" / "step-00000001", tmp_path / "out")
    assert exported.step == 1
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(saved(exported.path)[name], weights_of(full)[name])


def test_the_best_checkpoint_is_that_with_the_lowest_loss(full: Path, tmp_path: Path) -> None:
    lines = (full / "eval" / "history.jsonl").read_text().splitlines()
    losses = {point["step"]: point["loss"] for point in map(json.loads, lines)}
    assert list(losses) == [1, 2, 3]
    exported = export_checkpoint(full, tmp_path / "out", best=True)
    assert exported.step == min(losses, key=losses.__getitem__)
    state = json.loads((exported.checkpoint / "state.json").read_text())
    assert state["score"] == {
        "name": "loss", "value": losses[exported.step], "higher_is_better": False,
    }  # fmt: skip


def test_a_run_that_ends_behind_its_best_says_how_to_get_that(
    tiny: Path, toy_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Steps so large that the loss soon grows.
    measured = (f"data.eval={toy_shards}", "eval.every_steps=1", "eval.limit=2", "eval.after=false")
    wild = ("optim.learning_rate=0.3", "optim.warmup_steps=0", "eval.patience=2")
    output = tmp_path / "run"
    train(toy_config(tiny, toy_shards, output, *measured, *wild))  # saves the best and the last
    told = capsys.readouterr().out
    state = read_state(find_checkpoint(output, best=True))
    last = read_state(find_checkpoint(output)).step
    assert state.step == last - 2  # its patience
    assert f"these are the weights of step {last}; the best were those of step {state.step}" in told
    assert f"phi3v-train export {output} --best --out_dir FOLDER" in told
    exported = export_checkpoint(output, tmp_path / "best", best=True)
    newest = export_checkpoint(output, tmp_path / "newest")
    assert_equal(saved(newest.path), weights_of(output))
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(saved(exported.path)[name], weights_of(output)[name])


def test_adapters_are_merged_or_written_alone(tiny: Path, lora: Path, tmp_path: Path) -> None:
    merged = export_checkpoint(lora, tmp_path / "merged", check=True)
    alone = export_checkpoint(lora, tmp_path / "alone", adapter_only=True, check=True)
    assert (merged.kind, alone.kind) == ("merged model", "adapter")
    assert_equal(load_file(alone.path / "adapter_model.safetensors"), weights_of(lora))
    expected = probe(load_adapter(load_model(tiny), alone.path))
    assert largest_difference(probe(load_model(merged.path)), expected) < 1e-5
    assert largest_difference(probe(load_model(tiny)), expected) > 1e-3


def test_a_model_that_moved_is_named_and_another_one_is_refused(
    tiny: Path, full: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(tiny, moved)
    assert export_checkpoint(full, tmp_path / "a", model=moved).step == 3
    weights = saved(moved)
    save_file(
        {**weights, "lm_head.weight": weights["lm_head.weight"] + 1}, moved / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"its weights have another hash; .* --model"):
        export_checkpoint(full, tmp_path / "b", model=moved)
    assert not (tmp_path / "b").exists()


def test_what_cannot_be_exported_is_one_line(
    tiny: Path, full: Path, lora: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint; expected a run's output_dir"):
        find_checkpoint(tiny)
    with pytest.raises(CheckpointError, match="has no checkpoint with a score"):
        find_checkpoint(lora, best=True)
    with pytest.raises(CheckpointError, match="is one checkpoint; --best chooses among"):
        find_checkpoint(full / "checkpoints" / "step-00000001", best=True)
    with pytest.raises(ValueError, match=r"has no adapters: method\.name is full"):
        export_checkpoint(full, tmp_path / "out", adapter_only=True)
    with pytest.raises(ValueError, match="exists already"):
        export_checkpoint(full, tiny)
    stray = tmp_path / "stray" / "checkpoints" / "step-00000001"
    shutil.copytree(full / "checkpoints" / "step-00000001", stray)
    with pytest.raises(CheckpointError, match="which says what trained"):
        export_checkpoint(stray, tmp_path / "out")


def test_a_check_finds_a_weight_a_name_and_a_side_file_that_changed(
    tiny: Path, tmp_path: Path
) -> None:
    model, folder = load_model(tiny), tmp_path / "out"
    export_model(model, tiny, folder, None)
    check_export(folder, model, tiny)
    weights = saved(folder)

    def write(changed: dict[str, Tensor]) -> None:
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})

    write({**weights, "lm_head.weight": weights["lm_head.weight"] + 1e-3})
    with pytest.raises(ValueError, match=r"lm_head\.weight is not what was written"):
        check_export(folder, model, tiny)
    write({**weights, "odd": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"has other tensors than .*: odd and 0 more"):
        check_export(folder, model, tiny)
    write(weights)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json differs"):
        check_export(folder, model, tiny)


def test_code_that_auto_map_names_is_handed_on_as_it_is(tiny: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny, tmp_path / "base")
    fields = json.loads((base / "config.json").read_text())
    auto_map = {"AutoConfig": "configuration_phi3_v.Phi3VConfig"}
    (base / "config.json").write_text(json.dumps(fields | {"auto_map": auto_map}))
    code = "raise RuntimeError('run')\n"
    (base / "configuration_phi3_v.py").write_text(code)
    (base / "sample_inference.py").write_text(code)
    model, folder = load_model(base), tmp_path / "out"
    export_model(model, base, folder, None)
    check_export(folder, model, base)
    assert json.loads((folder / "config.json").read_text())["auto_map"] == auto_map
    assert [path.name for path in folder.glob("*.py")] == ["configuration_phi3_v.py"]
    assert (folder / "configuration_phi3_v.py").read_text() == code


def test_the_commands_say_what_they_wrote(tiny: Path, lora: Path, tmp_path: Path) -> None:
    for command in ("merge", "export"):
        out = tmp_path / command
        result = CliRunner().invoke(main, [command, str(lora), "--out_dir", str(out), "--check"])
        assert result.exit_code == 0, result.output
        assert "read again and found equal" in result.output
        again = CliRunner().invoke(main, [command, str(lora), "--out_dir", str(out)])
        assert again.exit_code == 1
        assert again.output.startswith("Error: ")
        assert "exists already" in again.output
    assert_equal(saved(tmp_path / "merge"), saved(tmp_path / "export"))
