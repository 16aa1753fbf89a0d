import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phi3v_data import Sample, Turn
from phi3v_train.chat import IGNORE_INDEX, ChatEncoder, user_pieces
from phi3v_train.collator import SampleEncoder
from phi3v_train.processing_phi3_v import Phi3VProcessor
from phi3v_train.tiny import init_tiny
from PIL import Image

from tests.train.builders import make_sample
from tests.train.parity import PARITY, needs_parity, read_json, run_lengths

EXAMPLES = read_json("chat/training_examples.json")["examples"] if PARITY.is_dir() else []


@pytest.fixture(scope="module")
def chat(tiny: Path) -> ChatEncoder:
    return ChatEncoder(tiny)


@pytest.fixture(scope="module", params=["tiny", "published"])
def coders(request: pytest.FixtureRequest, tiny: Path) -> tuple[ChatEncoder, Phi3VProcessor]:
    folder = tiny if request.param == "tiny" else PARITY / "phi-3.5-vision"
    if not folder.is_dir():
        pytest.skip("the published tokenizer is not beside this checkout")
    return ChatEncoder(folder), Phi3VProcessor.from_pretrained(folder, num_crops=1)


def ids_of(chat: ChatEncoder, sample: Sample, *, for_generation: bool = False) -> list[int]:
    text = chat.encode_text(sample, for_generation=for_generation)
    return chat.assemble(text, [(1, 1)] * len(sample.images))[0].tolist()


def learned(chat: ChatEncoder, sample: Sample) -> list[int]:
    _, labels = chat.assemble(chat.encode_text(sample), [(1, 1)] * len(sample.images))
    return labels[labels != IGNORE_INDEX].tolist()


# --- against the reference ------------------------------------------------------------------------


@needs_parity
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example["id"])
def test_training_ids_and_labels_equal_the_reference(example: dict) -> None:
    (turn,) = example["conversations"]
    sample = make_sample(example["id"], (turn["images"], turn["user"], turn["assistant"]))
    encoder = SampleEncoder(ChatEncoder(PARITY / "phi-3.5-vision"), example["num_crops"])
    images = [(PARITY / "chat" / name).read_bytes() for name in turn["images"]]
    if not turn["assistant"]:
        with pytest.raises(ValueError, match="turn 0 has no answer to learn"):
            encoder(sample, images)
        return
    encoded = encoder(sample, images)
    if turn["assistant"][0].isspace():  # the recipe's ids are none that a prompt can lead to
        prompt = encoded.input_ids[: example["first_label_position"]]
        assert prompt[-1] == encoder.chat.tokenizer.token_to_id("<|assistant|>")
        assert (
            encoder.chat.decode(encoded.input_ids[len(prompt) :].tolist())
            == turn["assistant"].strip()
        )
        return
    recorded = [
        encoder.chat.ids.image if i < 0 else i for i in run_lengths(example["input_ids_rle"])
    ]
    assert encoded.input_ids.tolist() == recorded
    assert encoded.labels.tolist() == run_lengths(example["labels_rle"])


# --- several turns --------------------------------------------------------------------------------

texts = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="<|>"), max_size=20
) | st.sampled_from(
    [" \n two  spaces ", "Grüße, 世界 🙂", "\t", "a\0b", "\x1c", "\u3000", "\u200b"]
)
answers = texts.filter(str.strip) | st.just("\x1f0")
turns = st.lists(st.tuples(st.integers(0, 2), texts, answers), min_size=1, max_size=3)


@given(turns)
@settings(deadline=None, max_examples=60)
def test_the_ids_before_every_answer_are_those_of_the_prompt(
    coders: tuple[ChatEncoder, Phi3VProcessor], turns: list[tuple[int, str, str]]
) -> None:
    chat, processor = coders
    picture = Image.new("RGB", (20, 10))
    prompt, done, count = "", [], 0
    for num_images, user, answer in turns:
        tags = "".join(f"<|image_{count + k + 1}|>" for k in range(num_images))
        count += num_images
        line = f"{tags}\n{user}" if num_images else user
        prompt += f"<|user|>\n{line}<|end|>\n<|assistant|>\n"
        done.append(([f"{count}-{k}.png" for k in range(num_images)], user, answer))
        sample = make_sample("s", *done)
        expected = processor(prompt, [picture] * count)["input_ids"][0].numpy()
        expected = np.where(expected < 0, chat.ids.image, expected).tolist()
        assert ids_of(chat, sample, for_generation=True) == expected
        assert ids_of(chat, sample)[: len(expected)] == expected
        prompt += f"{answer}<|end|>\n"


def test_every_turn_carries_loss_up_to_its_end_and_the_last_ends_the_text(
    chat: ChatEncoder,
) -> None:
    sample = make_sample("s", (["a.png"], "What?", "A cat."), ([], "Sure?", "Yes."))
    found = learned(chat, sample)
    assert found.count(chat.ids.end) == 2
    assert found.count(chat.ids.end_of_text) == 1
    assert found[-1] == chat.ids.end_of_text
    assert ids_of(chat, sample).count(chat.ids.bos) == 2  # at the start and behind the image
    first, second = " ".join(chat.decode(found).split()).split(".")[:2]
    assert (first, second.strip()) == ("A cat", "Yes")


def test_labels_are_the_ids_where_there_is_loss(chat: ChatEncoder) -> None:
    sample = make_sample("s", (["a.png"], "What?", "A cat."), (["b.png"], "And?", "A dog."))
    ids, labels = chat.assemble(chat.encode_text(sample), [(1, 1), (2, 1)])
    assert len(ids) == len(labels)
    assert np.array_equal(labels[labels != IGNORE_INDEX], ids[labels != IGNORE_INDEX])
    assert (labels[ids == chat.ids.image] == IGNORE_INDEX).all()


@pytest.mark.parametrize("space", [" ", "\n", " \n\t "])
def test_leading_white_space_of_an_answer_changes_nothing(chat: ChatEncoder, space: str) -> None:
    plain, spaced = (
        make_sample("s", ([], "Q", "One"), ([], "R", answer)) for answer in ("Two", space + "Two")
    )
    assert ids_of(chat, plain) == ids_of(chat, spaced)
    assert learned(chat, plain) == learned(chat, spaced)


def test_generation_leaves_the_last_answer_out_and_may_lack_it(chat: ChatEncoder) -> None:
    turn = Turn(images=(), user="Q")
    open_end = Sample(id="s", source="toy", conversations=(turn,))
    answered = make_sample("s", ([], "Q", "secret"))
    asked = ids_of(chat, answered, for_generation=True)
    assert asked == ids_of(chat, open_end, for_generation=True)
    assert ids_of(chat, answered)[: len(asked)] == asked


# --- where images stand ---------------------------------------------------------------------------


def test_images_come_first_unless_they_are_placed() -> None:
    assert user_pieces(Turn(images=("a", "b"), user="Q")) == ["", "", "\nQ"]
    placed = Turn(images=("a", "b"), user="Here <|image_1|> and\0there <|image_2|>.")
    assert user_pieces(placed) == ["Here ", " and\0there ", "."]
    assert user_pieces(Turn(images=(), user="Q")) == ["Q"]


def test_placed_images_are_numbered_within_their_turn(chat: ChatEncoder) -> None:
    sample = make_sample(
        "s", (["a.png"], "Q", "One"), (["b.png", "c.png"], "<|image_1|>x<|image_2|>", "Two")
    )
    text = chat.encode_text(sample)
    assert len(text.pieces) == 4
    assert [piece[0] for piece in text.pieces] == [chat.ids.bos] * 4
    slots = [313, 313, 601]
    ids, _ = chat.assemble(text, [(1, 1), (1, 1), (1, 3)])
    runs = np.diff(np.flatnonzero(np.diff(np.pad(ids == chat.ids.image, 1).astype(int))))[::2]
    assert runs.tolist() == slots
    assert text.num_tokens == len(ids) - sum(slots)


@pytest.mark.parametrize(
    "user",
    ["<|image_2|><|image_1|>", "<|image_1|>", "<|image_1|><|image_1|><|image_2|>", "<|image_3|>"],
)
def test_images_placed_twice_or_not_at_all_are_refused_by_name(
    chat: ChatEncoder, user: str
) -> None:
    sample = make_sample("odd", (["a.png", "b.png"], user, "A"))
    with pytest.raises(ValueError, match=r"'odd': expected the marks .* once each, in order, got"):
        chat.encode_text(sample)


def test_as_many_images_as_places_are_needed(chat: ChatEncoder) -> None:
    text = chat.encode_text(make_sample("s", (["a.png"], "Q", "A")))
    with pytest.raises(ValueError, match="expected 1 images, got 0"):
        chat.assemble(text, [])


# --- folders --------------------------------------------------------------------------------------


def test_a_missing_folder_and_a_folder_without_a_tokenizer_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model folder at"):
        ChatEncoder(tmp_path / "none")
    with pytest.raises(ValueError, match=r"no tokenizer\.json in"):
        ChatEncoder(tmp_path)


def test_a_tokenizer_without_the_special_tokens_is_refused(tiny: Path, tmp_path: Path) -> None:
    content = (tiny / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(content.replace("<|end|>", "<|stop|>"))
    with pytest.raises(ValueError, match=r"has no token '<\|end\|>'"):
        ChatEncoder(tmp_path)


def test_the_fingerprint_follows_the_tokenizer_alone(tiny: Path, tmp_path: Path) -> None:
    shutil.copy(tiny / "tokenizer.json", tmp_path)
    assert ChatEncoder(tmp_path).fingerprint == ChatEncoder(tiny).fingerprint
    other = init_tiny(tmp_path / "other", texts=["wibble wobble"] * 50).path
    assert ChatEncoder(other).fingerprint != ChatEncoder(tiny).fingerprint
