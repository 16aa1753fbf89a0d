from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from phi3v_train.cli import main
from phi3v_train.generate import encode, generate, load
from PIL import Image


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / "red.png", folder / "blue.jpg"]
    Image.new("RGB", (60, 40), "red").save(paths[0])
    Image.new("RGB", (40, 60), "blue").save(paths[1])
    return [str(path) for path in paths]


def test_the_answer_is_the_greedy_one_and_comes_in_pieces(tiny: Path, pictures: list[str]) -> None:
    model, processor = load(tiny, num_crops=1, device="cpu")
    pieces: list[str] = []
    answer = generate(
        model, processor, "What changed?", pictures, max_new_tokens=12, on_text=pieces.append
    )
    ids = encode(processor, "What changed?", pictures)["input_ids"]
    output = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
        **encode(processor, "What changed?", pictures), max_new_tokens=12, do_sample=False
    )
    expected = processor.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer.text == expected.strip()
    assert "".join(pieces).strip() == answer.text
    assert (answer.num_prompt_tokens, answer.num_image_tokens) == (ids.shape[1], 2 * 313)
    assert 1 <= answer.num_new_tokens <= 12
    assert answer.first_token_s > 0
    assert f"{answer.num_new_tokens} tokens in " in answer.speed


def test_pictures_come_first_or_where_the_prompt_has_them(tiny: Path, pictures: list[str]) -> None:
    _, processor = load(tiny, num_crops=1, device="cpu")
    first = encode(processor, "Which?", pictures)["input_ids"][0].tolist()
    placed = encode(processor, "<|image_1|><|image_2|>\nWhich?", pictures)["input_ids"][0].tolist()
    assert first == placed
    between = encode(processor, "Is <|image_1|> like <|image_2|>?", pictures)["input_ids"]
    assert between[0].tolist() != first
    with pytest.raises(ValueError, match="once each and in order"):
        encode(processor, "<|image_2|>?", pictures[:1])


def test_sampling_follows_its_seed(tiny: Path) -> None:
    model, processor = load(tiny, device="cpu")

    def say(seed: int, temperature: float = 1.5) -> str:
        return generate(
            model, processor, "Hi", max_new_tokens=16, temperature=temperature, seed=seed
        ).text

    assert say(1) == say(1) != say(2)
    assert say(1, temperature=0) == say(2, temperature=0)


def test_the_command_answers_on_stdout_and_times_on_stderr(tiny: Path, pictures: list[str]) -> None:
    arguments = ["generate", "--model", str(tiny), "--num-crops", "1", "--max_new_tokens", "9"]
    arguments += [x for path in pictures for x in ("--image", path)]
    done = CliRunner().invoke(main, [*arguments, "--prompt", "What changed?"])
    assert done.exit_code == 0, done.output
    model, processor = load(tiny, num_crops=1, device="cpu")
    answer = generate(model, processor, "What changed?", pictures, max_new_tokens=9)
    assert done.stdout.strip() == answer.text
    assert "tokens/s" in done.stderr
    assert "626 of them images" in done.stderr


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--image", "nowhere.jpg"], "Error: cannot read the image nowhere.jpg"),
        (["--adapter", "nowhere"], "Error: nowhere is not an adapter folder"),
        (["--model", "nowhere"], "Error: nowhere is not a model folder"),
    ],
)
def test_a_mistake_is_one_line(tiny: Path, options: list[str], reason: str) -> None:
    arguments = ["generate", "--model", str(tiny), "--prompt", "What?", *options]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1
    assert done.stderr.startswith(reason)
    assert done.stderr.count("\n") == 1


def test_the_model_is_the_folders_in_its_own_precision(tiny: Path) -> None:
    model, processor = load(tiny, device="cpu")
    assert model.dtype == torch.float32
    assert processor.image_processor.num_crops == 4
    assert not model.training
