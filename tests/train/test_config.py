from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from phi3v_train.config import (
    ConfigError,
    TrainConfig,
    dump_config,
    load_config,
    maths_changes,
    training_maths,
)

REQUIRED = ("model=m", "output_dir=o", "data.train=d")
FILE = "model: m\noutput_dir: o\ndata: {train: d}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "train.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def error_of(*arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_are_those_of_the_recipe():
    config = load_config(None, REQUIRED)
    assert config.optim.model_dump() == {
        "name": "adamw",
        "learning_rate": 4e-5,
        "vision_lr": None,
        "projector_lr": None,
        "weight_decay": 0.01,
        "decay_on": "all",
        "betas": (0.9, 0.95),
        "eps": 1e-7,
        "max_grad_norm": 1.0,
        "schedule": "linear",
        "warmup_steps": 50,
    }
    assert (config.train.global_batch_size, config.train.num_epochs) == (16, 1)
    assert (config.method.lora.rank, config.method.lora.lora_alpha) == (64, 128)
    assert (config.data.num_crops, config.eval.max_new_tokens) == (16, 64)


def test_a_file_fills_the_tree_and_the_later_override_wins(tmp_path):
    text = FILE + "optim:\n  learning_rate: 1e-4\n  betas: [0.8, 0.9]\nmethod: {name: lora}\n"
    path = write(tmp_path, text)
    config = load_config(path, ["optim.learning_rate=1e-5", "optim.learning_rate=2e-5"])
    assert config.optim.learning_rate == 2e-5
    assert config.optim.betas == (0.8, 0.9)
    assert config.method.name == "lora"
    assert config.model == Path("m")


def test_numbers_and_words_follow_yaml_1_2(tmp_path):
    path = write(tmp_path, FILE + "seed: 010\noptim: {learning_rate: 4e-5, eps: 1e-8}\n")
    config = load_config(path, ["output_dir=no"])
    assert (config.seed, config.optim.learning_rate, config.optim.eps) == (10, 4e-5, 1e-8)
    assert config.output_dir == Path("no")


def test_an_empty_override_means_null():
    assert load_config(None, [*REQUIRED, "data.eval=e", "data.eval="]).data.eval is None


def test_an_override_may_fill_a_whole_section():
    config = load_config(None, [*REQUIRED, "optim={schedule: cosine, warmup_steps: 3}"])
    assert (config.optim.schedule, config.optim.warmup_steps) == ("cosine", 3)


def test_a_misspelt_key_names_file_line_and_nearest_name(tmp_path):
    path = write(tmp_path, FILE + "optim:\n  learning_rte: 1e-4\n")
    assert error_of(path) == (
        f"unknown key 'optim.learning_rte' in {path}, line 5; did you mean 'optim.learning_rate'?"
    )


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("optim.lr_schedule=linear", "optim.schedule"),
        ("learning_rate=1", "optim.learning_rate"),
        ("train.max_step=1", "train.max_steps"),
        ("lora.rank=8", "method.lora"),
        ("num_epoch=1", "train.num_epochs"),
    ],
)
def test_a_misspelt_or_misplaced_override_names_the_nearest_key(override, suggestion):
    message = error_of(None, [*REQUIRED, override])
    assert message.startswith("unknown key ")
    assert message.endswith(f"in override {override!r}; did you mean {suggestion!r}?")


def test_a_key_like_no_other_gets_the_list_of_keys():
    assert "expected one of checkpoint.every_steps, checkpoint." in error_of(
        None, [*REQUIRED, "checkpoint.zzz=1"]
    )


def test_a_duplicate_key_names_both_lines(tmp_path):
    path = write(tmp_path, FILE + "optim:\n  eps: 1e-8\n  eps: 1e-7\n")
    assert error_of(path) == (
        f"duplicate key 'optim.eps' in {path}, line 6 (first in line 5); keep one of them"
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.learning_rate=fast", "expected a number, got 'fast' (a text)"),
        ("optim.learning_rate=-1", "expected a number greater than 0, got -1"),
        ("optim.learning_rate=.inf", "expected a finite number, got inf"),
        ("train.max_steps=1.5", "expected a whole number, got 1.5"),
        ("train.max_steps=true", "expected a whole number, got True"),
        ("eval.before=1", "expected true or false, got 1"),
        ("method.name=lara", "expected 'full', 'lora' or 'qlora', got 'lara' (a text)"),
        ("method.freeze=[vison]", "expected 'vision', 'projector' or 'llm', got 'vison' (a text)"),
        ("method.freeze=vision", "expected a list, got 'vision' (a text)"),
        ("method=lora", "expected a section with keys, got 'lora' (a text)"),
        ("model=7", "expected a path, got 7"),
        ("model=", "expected a path, got null"),
        ("optim.betas=[0.9]", "expected a longer list, got [0.9] (a list)"),
    ],
)
def test_a_wrong_value_says_key_place_expected_and_got(override, expected):
    message = error_of(None, [*REQUIRED, override])
    key = override.split("=")[0]
    assert message.startswith(f"{key} in override {override!r}: ")
    assert expected in message


def test_a_missing_key_says_what_it_is_for(tmp_path):
    path = write(tmp_path, "output_dir: o\ndata: {train: d}\n")
    assert error_of(path) == (
        f"missing key 'model' in {path}: Hugging Face folder of the model to start from."
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("- a\n", "expected `key: value` lines"),
        ("model: [a\n", "line 2: not valid YAML"),
        ("model: !!python/object:os.system x\n", "not valid YAML"),
        ("model: \x07\n", "not valid YAML"),
        ("", "missing key 'model'"),
        ("? [a]\n: b\n", "a key must be a name"),
    ],
)
def test_a_file_that_is_no_configuration_says_so(tmp_path, text, problem):
    message = error_of(write(tmp_path, text))
    assert problem in message
    assert "train.yaml" in message


def test_a_missing_file_a_folder_and_a_binary_file_are_told_apart(tmp_path):
    assert "no configuration file" in error_of(tmp_path / "x.yaml")
    assert "Is a directory" in error_of(tmp_path)
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "not a UTF-8 text file" in error_of(binary)


@pytest.mark.parametrize("override", ["optim", "=3", "a..b=3", ""])
def test_an_override_without_key_or_value_shows_the_form(override):
    assert "expected KEY=VALUE" in error_of(None, [override])


def test_an_override_below_a_value_is_refused():
    assert "expected a section, got 'm' (a text)" in error_of(None, [*REQUIRED, "model.x=1"])


def test_freezing_everything_is_refused():
    assert "nothing is left to train" in error_of(
        None, [*REQUIRED, "method.freeze=[llm, vision, projector]"]
    )
    assert "nothing is left to train" in error_of(
        None, [*REQUIRED, "method={name: lora, freeze: [llm], lora: {targets: [llm]}}"]
    )


def test_a_frozen_part_gets_no_adapter():
    config = load_config(None, [*REQUIRED, "method.name=lora", "method.freeze=[vision]"])
    assert config.method.trained_parts == ("projector", "llm")


def test_a_part_that_trains_in_full_gets_no_adapter():
    method = load_config(
        None, [*REQUIRED, "method.name=qlora", "method.lora.full=[vision]", "optim.vision_lr=1e-5"]
    ).method
    assert method.adapter_parts == ("projector", "llm")
    assert method.full_parts == ("vision",)
    assert method.trained_parts == ("vision", "projector", "llm")


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("{freeze: [vision], lora: {full: [vision]}}", "vision is in freeze and in lora.full"),
        ("{lora: {targets: [llm], full: [llm]}}", "no part is left that gets an adapter"),
        ("{name: qlora, lora: {full: [llm]}}", "qlora keeps the language model in 4 bits"),
        ("{lora: {rank: 1, alpha_ratio: 0.4}}", "rounds to alpha 0"),
    ],
)
def test_adapters_that_contradict_themselves_are_refused(method, reason):
    name = [] if "qlora" in method else ["method.name=lora"]
    assert reason in error_of(None, [*REQUIRED, f"method={method}", *name])


def test_alpha_is_the_ratio_times_the_rank_unless_it_is_set():
    def alpha(*settings):
        overrides = [f"method.lora.{setting}" for setting in settings]
        return load_config(None, [*REQUIRED, *overrides]).method.lora.lora_alpha

    assert alpha("rank=32", "alpha_ratio=0.5") == 16
    assert alpha("rank=32", "alpha=7") == 7


def test_a_rate_of_a_part_that_does_not_train_is_refused():
    for key, part in (("vision_lr", "vision"), ("projector_lr", "projector")):
        assert f"the method trains no {part}" in error_of(
            None, [*REQUIRED, f"optim.{key}=1e-5", f"method.freeze=[{part}]"]
        )


def test_more_fields_of_peft_are_given_by_name(tmp_path):
    path = write(tmp_path, FILE + "method:\n  lora: {extra: {use_rslora: true}}\n")
    config = load_config(path, ["method.lora.extra.lora_bias=false"])
    assert config.method.lora.extra == {"use_rslora": True, "lora_bias": False}


def test_evaluation_before_training_needs_data():
    assert "data.eval is not" in error_of(None, [*REQUIRED, "eval.before=true"])


@given(
    seed=st.integers(0, 2**63 - 1),
    rate=st.floats(1e-300, 1e300),
    name=st.text(
        st.characters(codec="utf-8", exclude_categories=["C", "Z"], exclude_characters="~/."),
        min_size=1,
    ),
)
def test_a_dumped_configuration_loads_equal(tmp_path_factory, seed, rate, name):
    config = load_config(None, [*REQUIRED, f"seed={seed}", f"optim.learning_rate={rate!r}"])
    config = config.model_copy(update={"model": Path(name), "output_dir": Path("1e5")})
    path = tmp_path_factory.mktemp("dump") / "resolved.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


def test_the_tree_is_frozen():
    config = load_config(None, REQUIRED)
    with pytest.raises(ValueError, match="frozen"):
        config.optim.eps = 1.0  # pyright: ignore[reportAttributeAccessIssue]


def test_the_maths_ignores_where_and_how_often_but_not_how():
    def maths(*overrides):
        return training_maths(load_config(None, [*REQUIRED, *overrides]))

    plain = maths()
    for harmless in (
        "output_dir=p",
        "data.num_workers=0",
        "train.log_every=1",
        "eval.limit=9",
    ):
        assert maths(harmless) == plain
    assert maths("method.lora.rank=8") == plain  # not read by full training
    for other in ("seed=1", "optim.eps=1e-8", "train.global_batch_size=8", "method.name=lora"):
        assert maths(other) != plain


def test_changes_of_the_maths_are_listed_by_key():
    then = training_maths(load_config(None, REQUIRED))
    now = training_maths(load_config(None, [*REQUIRED, "seed=3", "optim.schedule=cosine"]))
    assert maths_changes(then, now) == ("optim.schedule: linear -> cosine", "seed: 0 -> 3")


def test_every_field_has_a_description():
    def walk(section):
        for name, field in section.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                assert field.annotation.__doc__
                walk(field.annotation)
            else:
                assert field.description, f"{section.__name__}.{name}"

    walk(TrainConfig)
