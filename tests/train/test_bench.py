import json

import pytest
import torch
from click.testing import CliRunner
from phi3v_train.bench import FORMULA, made_up_rows, model_sizes, random_training
from phi3v_train.cli import main
from phi3v_train.config import load_config
from phi3v_train.flops import Work, training_flops
from phi3v_train.hd_transform import num_image_tokens

TINY = ("model=tiny", "device=cpu", "data.num_crops=1", "data.max_tokens_per_row=400",
        "train.global_batch_size=2")  # fmt: skip


def config(*overrides):
    return load_config(None, ["output_dir=o", "data.train=d", *TINY, *overrides])


def bench(*overrides, flags=("--steps", "2", "--warmup", "1")):
    torch.set_num_threads(1)
    return CliRunner().invoke(main, ["bench", *TINY, *overrides, *flags])


def test_a_bench_of_a_tiny_model_measures_steps_and_says_what_they_were():
    done = bench(flags=("--steps", "2", "--warmup", "1", "--json"))
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert len(result["seconds"]) == 2
    assert all(seconds > 0 for seconds in result["seconds"])
    assert result["row_tokens"] == num_image_tokens(1, 1) + 38 == result["sample_tokens"]
    assert (result["crops_per_row"], result["rows_per_step"], result["num_devices"]) == (2, 2, 1)
    assert result["mfu"] is None  # nobody publishes a CPU's peak
    assert result["formula"] == FORMULA
    sizes = model_sizes(config().model)
    row = Work.of_row(made_up_rows(config(), sizes, 1)[0])
    assert result["flops_per_step"] == 2 * training_flops(sizes, config().method, row)
    images = result["rows_per_step"] * result["images_per_row"]
    assert result["images_per_second"] == pytest.approx(images / result["step_seconds"])
    assert result["peak_bytes"] > 2**20


def test_what_is_printed_makes_the_numbers_comparable():
    done = bench("method.name=lora", "method.gradient_checkpointing=true", "method.lora.rank=4")
    assert done.exit_code == 0, done.output
    for words in ("1 x cpu, single, fp32", "lora, rank 4", "recomputed", "351 tokens", "2 crops",
                  "images/s", "no peak of cpu", "recomputed operations don't count"):  # fmt: skip
        assert words in done.stdout


def test_rows_are_as_full_as_whole_samples_make_them_and_share_out_the_batch():
    sizes = model_sizes(config().model)
    wide = ("data.max_tokens_per_row=6000", "train.global_batch_size=64")
    rows = made_up_rows(config(*wide), sizes, 8)
    assert rows[0].max_seqlen == 8 * num_image_tokens(1, 1) + 38  # eight frames
    assert len(rows[0].sample_ids) == 2
    assert len(rows) * 2 * 8 == 64
    rows = made_up_rows(config(*wide, "data.num_crops=16"), sizes, 64)
    assert len(rows[0].sample_ids) == 1  # there is one for each device, and no more
    assert rows[0].max_seqlen == num_image_tokens(4, 4) + 38


def test_a_row_that_holds_no_sample_is_refused_with_its_length():
    done = bench("data.num_crops=16")
    assert done.exit_code == 1
    assert "a sample with one image of 16 crops has" in done.output
    assert "got rows of 400" in done.output


@pytest.mark.parametrize(
    ("method", "is_shared", "place"),
    [("full", False, "meta"), ("full", True, "cpu"), ("qlora", False, "cpu")],
)
def test_weights_are_born_on_the_device_unless_it_is_not_to_hold_them_whole(
    method: str, is_shared: bool, place: str
) -> None:
    # the meta device stands for a GPU: what is born there takes no memory of this machine
    sizes = model_sizes(config().model)
    wanted = config(f"method.name={method}", "method.lora.rank=4")
    training = random_training(sizes, wanted, "fp32", torch.device("meta"), is_shared=is_shared)
    assert training.model.model.embed_tokens.weight.device.type == place


def test_a_model_that_is_neither_a_folder_nor_a_known_word_is_named():
    done = bench("model=nowhere")
    assert done.exit_code == 1
    assert "model=nowhere is no model folder" in done.output


def test_the_real_sizes_have_a_word_of_their_own():
    sizes = model_sizes(config("model=phi-3.5-vision").model)
    assert (sizes.hidden_size, sizes.num_hidden_layers) == (3072, 32)
