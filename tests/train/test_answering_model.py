"""A model by any folder at hand: of a model, of a run, of adapters."""

from pathlib import Path

import pytest
from phi3v_train.answering_model import AnsweringModel, find_answering_model
from phi3v_train.evaluate import evaluate_model
from phi3v_train.generate import load
from phi3v_train.trainer import train

from tests.train.builders import toy_config


@pytest.fixture(scope="module")
def lora_run(tiny: Path, toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of adapters that change answers: two steps at a high rate."""
    output = tmp_path_factory.mktemp("runs") / "lora"
    options = ("method.name=lora", "train.max_steps=2", "optim.learning_rate=0.1")
    train(toy_config(tiny, toy_shards, output, *options))
    return output


def answers(shards: Path, model: Path, adapter: Path | None = None) -> list[str]:
    """With the crop count that the folders say."""
    result = evaluate_model(model, shards, adapter=adapter, max_new_tokens=4, limit=3, device="cpu")
    return [p.prediction for p in result.predictions]


def test_a_run_its_adapter_and_the_adapter_on_its_base_answer_alike(
    tiny: Path, toy_shards: Path, lora_run: Path
) -> None:
    adapter = lora_run / "adapter"
    assert find_answering_model(lora_run) == AnsweringModel(tiny, adapter, num_crops=1)
    assert find_answering_model(adapter) == AnsweringModel(tiny, adapter)
    assert find_answering_model(tiny, lora_run) == AnsweringModel(tiny, adapter, num_crops=1)
    assert find_answering_model(tiny, adapter) == AnsweringModel(tiny, adapter)
    found = answers(toy_shards, lora_run)
    assert found == answers(toy_shards, tiny, lora_run)
    assert found != answers(toy_shards, tiny)


def test_a_run_asks_with_the_crops_it_was_trained_with(lora_run: Path) -> None:
    _, processor = load(lora_run, device="cpu")
    assert processor.image_processor.num_crops == 1
    _, processor = load(lora_run, num_crops=4, device="cpu")
    assert processor.image_processor.num_crops == 4


def test_a_run_of_all_weights_is_its_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "config.yaml").write_text("data: {num_crops: 4}\n")
    assert find_answering_model(tmp_path) == AnsweringModel(tmp_path / "model", None, num_crops=4)


def test_what_cannot_answer_says_what_to_name_instead(
    tiny: Path, lora_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text("data: {num_crops: 4}\n")
    with pytest.raises(ValueError, match=r"not finished; .*`phi3v-train export .* --out_dir NEW`"):
        find_answering_model(tmp_path)
    with pytest.raises(ValueError, match="with an adapter name the base"):
        find_answering_model(lora_run, lora_run / "adapter")
    moved = tmp_path / "moved"
    moved.mkdir()
    text = (lora_run / "adapter" / "adapter_config.json").read_text()
    (moved / "adapter_config.json").write_text(text.replace(str(tiny), "gone/base"))
    with pytest.raises(ValueError, match="trained on gone/base, which is no model folder here"):
        find_answering_model(moved)
    assert find_answering_model(tmp_path / "nothing").folder == tmp_path / "nothing"
