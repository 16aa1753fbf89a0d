"""Whole runs of methods and optimizers: stopped and resumed, evaluated, and what they write."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from phi3v_train.lora import load_adapter
from phi3v_train.trainer import describe, train

from tests.train.builders import fresh_model, log_lines, losses_of, toy_config, weights_of

torch.set_num_threads(1)  # more of them wait for each other on models this small

RUNS = {
    "qlora": ("method.name=qlora", "method.lora.dropout=0.1"),
    "qlora, 8-bit moments": ("method.name=qlora", "optim.name=adamw8bit", "method.lora.rank=32"),
    "full, 8-bit moments": ("optim.name=adamw8bit",),
    "vision in full, rates by part": (
        "method.name=lora",
        "method.lora.full=[vision, projector]",
        "optim.vision_lr=2e-4",
        "optim.projector_lr=5e-3",
        "optim.decay_on=matrices",
    ),
    "more of PEFT": ("method.name=lora", "method.lora.extra={use_dora: true, use_rslora: true}"),
    "bf16": ("precision=bf16", "method.name=qlora", "method.lora.full=[vision]"),
}
FAST = ("qlora, 8-bit moments", "vision in full, rates by part")


LONG = [pytest.mark.slow, pytest.mark.long]


@pytest.mark.parametrize(
    "options",
    [pytest.param(RUNS[n], id=n, marks=[] if n in FAST else LONG) for n in RUNS],
)
def test_a_run_that_was_stopped_ends_bitwise_as_the_one_that_was_not(
    options: tuple[str, ...], tiny: Path, toy_shards: Path, tmp_path: Path
) -> None:
    more = (*options, "train.max_steps=4", "checkpoint.every_steps=2", "checkpoint.keep=9")
    train(toy_config(tiny, toy_shards, tmp_path / "whole", *more))
    checkpoints = tmp_path / "resumed" / "checkpoints"
    name = "step-00000002"
    shutil.copytree(tmp_path / "whole" / "checkpoints" / name, checkpoints / name)
    (checkpoints / "latest").write_text(f"{name}\n")
    train(toy_config(tiny, toy_shards, tmp_path / "resumed", *more), resume=True)
    assert [line["step"] for line in log_lines(tmp_path / "resumed")] == [3, 4]
    assert losses_of(tmp_path / "resumed") == losses_of(tmp_path / "whole")[2:]
    resumed, whole = weights_of(tmp_path / "resumed"), weights_of(tmp_path / "whole")
    assert resumed.keys() == whole.keys()
    for key, tensor in whole.items():
        assert torch.equal(resumed[key], tensor), key


def test_parts_in_full_are_in_the_checkpoint_and_in_the_adapter_and_learn_at_their_own_rate(
    tiny: Path, toy_shards: Path, tmp_path: Path
) -> None:
    more = ("method.name=lora", "method.lora.full=[vision]", "train.max_steps=1")
    more += ("optim.weight_decay=0", "optim.warmup_steps=0", f"data.eval={toy_shards}")
    more += ("eval.limit=2", "eval.max_new_tokens=2")
    # Adam's first step is as long as the rate, in every direction that has a gradient.
    for rate in (1e-3, 1e-4):
        output = tmp_path / str(rate)
        train(toy_config(tiny, toy_shards, output, *more, f"optim.vision_lr={rate}"))
        base, trained = (
            dict(m.named_parameters())
            for m in (fresh_model(tiny), load_adapter(fresh_model(tiny), output / "adapter"))
        )
        name = "model.vision_embed_tokens.img_processor.vision_model.embeddings.patch_embedding"
        moved = float((trained[f"{name}.weight"] - base[f"{name}.weight"]).detach().abs().max())
        assert moved == pytest.approx(rate, rel=0.05)
        assert json.loads((output / "eval_after.json").read_text())["num_samples"] == 2


def test_a_dry_run_of_qlora_counts_what_would_train(
    tiny: Path, toy_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts: list[str] = []
    for method in ("lora", "qlora"):
        describe(toy_config(tiny, toy_shards, tmp_path / "run", f"method.name={method}"))
        (line,) = [s for s in capsys.readouterr().out.splitlines() if "trainable" in s]
        counts.append(line)
    assert counts[0] == counts[1]


def test_fields_that_peft_lacks_are_refused_before_anything_is_written(
    tiny: Path, toy_shards: Path, tmp_path: Path
) -> None:
    config = toy_config(
        tiny, toy_shards, tmp_path / "run", "method.name=lora", "method.lora.extra={rank_: 3}"
    )
    for start in (train, describe):
        with pytest.raises(ValueError, match=r"^method\.lora\.extra: PEFT .* has no rank_"):
            start(config)
    assert not (tmp_path / "run").exists()
