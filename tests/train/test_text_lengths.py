import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from phi3v_data import ShardReader, open_shards
from phi3v_train import text_lengths as module
from phi3v_train.chat import IGNORE_INDEX, ChatEncoder
from phi3v_train.collator import SampleEncoder
from phi3v_train.stream import measure_shards
from phi3v_train.text_lengths import TextCounts, text_lengths
from phi3v_train.tiny import init_tiny

from tests.train.builders import make_sample, make_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardReader:
    """Conversations of one to three turns with and without images, marked and not."""
    samples = [
        make_sample(
            f"s{number}",
            *[
                ((f"{number}-{turn}.png",) if turn % 2 else (), "Why? " * (number % 5 + 1), "So.")
                for turn in range(number % 3 + 1)
            ],
        )
        for number in range(40)
    ]
    samples.append(
        make_sample("marked", (["a.png", "b.png"], "From <|image_1|> to <|image_2|>?", "  Far. "))
    )
    return open_shards(make_shards(tmp_path_factory.mktemp("texts"), samples))


@pytest.fixture(scope="module")
def chat(tiny: Path) -> ChatEncoder:
    return ChatEncoder(tiny)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "phi3v-train" / "text_lengths"


def stored(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.bin"))


def lists(counts: TextCounts) -> tuple[list[int], list[int]]:
    return counts.num_tokens.tolist(), counts.num_label_tokens.tolist()


def refuse_to_count(*_: object) -> None:
    raise AssertionError("counted again")


def test_lengths_are_those_of_the_encoded_samples(shards: ShardReader, chat: ChatEncoder) -> None:
    encoder = SampleEncoder(chat, num_crops=4)
    measures = measure_shards(shards, encoder)
    for number, record in enumerate(shards):
        encoded = encoder(record.sample, record.images)
        assert measures.num_tokens[number] == len(encoded.input_ids)
        assert measures.num_label_tokens[number] == (encoded.labels != IGNORE_INDEX).sum()
        assert measures.num_images[number] == len(encoded.crop_grid)
        assert measures.num_crops[number] == len(encoded.crops) + len(encoded.crop_grid)


def test_lengths_are_counted_once(
    shards: ShardReader, chat: ChatEncoder, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = lists(text_lengths(shards, chat))
    assert len(stored(own_cache)) == 1
    monkeypatch.setattr(ChatEncoder, "count_tokens", refuse_to_count)
    assert lists(text_lengths(shards, chat)) == first


def test_processes_count_the_same_and_progress_comes_to_the_end(
    shards: ShardReader, chat: ChatEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = lists(text_lengths(shards, chat))
    monkeypatch.setattr(module, "WORTH_A_PROCESS", len(shards) // 2)
    monkeypatch.setattr(ChatEncoder, "count_tokens", refuse_to_count)  # in this process
    seen: list[int] = []
    found = text_lengths(
        shards, chat, cache_dir=tmp_path / "two", num_workers=2, on_progress=seen.append
    )
    assert lists(found) == alone
    assert seen[-1] == len(shards)


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "longer"])
def test_a_damaged_file_is_made_anew(
    shards: ShardReader, chat: ChatEncoder, own_cache: Path, damage: str
) -> None:
    first = lists(text_lengths(shards, chat))
    (file,) = stored(own_cache)
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    file.write_bytes(
        {"flipped": flipped, "cut": whole[:-4], "empty": b"", "longer": whole + b"\0" * 8}[damage]
    )
    assert lists(text_lengths(shards, chat)) == first
    assert file.read_bytes() == whole


def test_another_tokenizer_data_set_or_prompt_format_is_counted_anew(
    shards: ShardReader,
    chat: ChatEncoder,
    own_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text_lengths(shards, chat)
    other = init_tiny(tmp_path / "other", seed=0).path / "tokenizer.json"
    other.write_text(other.read_text() + "\n")
    text_lengths(shards, ChatEncoder(other))
    assert len(stored(own_cache)) == 2
    more = make_shards(tmp_path / "more", [make_sample("one", ((), "Why?", "So."))])
    text_lengths(open_shards(more), chat)
    assert len(stored(own_cache)) == 3
    monkeypatch.setattr(module, "PROMPT_FORMAT_VERSION", 99)
    text_lengths(shards, chat)
    assert len(stored(own_cache)) == 4


def test_those_who_start_together_count_once(
    shards: ShardReader, chat: ChatEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    real = ChatEncoder.count_tokens

    def count(self: ChatEncoder, samples: list) -> object:
        counted.append(len(samples))
        return real(self, samples)

    monkeypatch.setattr(ChatEncoder, "count_tokens", count)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: lists(text_lengths(shards, chat)), range(4)))
    assert found == [found[0]] * 4
    assert counted == [len(shards)]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written_only_costs_time(
    shards: ShardReader, chat: ChatEncoder, tmp_path: Path
) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    text_lengths(shards, chat, cache_dir=tmp_path / "locked" / "below")


def test_a_cache_below_a_file_only_costs_time(
    shards: ShardReader, chat: ChatEncoder, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    counts = text_lengths(shards, chat, cache_dir=tmp_path / "file" / "below")
    assert lists(counts) == lists(text_lengths(shards, chat))


def test_a_sample_that_cannot_be_encoded_is_named(chat: ChatEncoder) -> None:
    without = make_sample("s7", ((), "Why?", " "))
    with pytest.raises(ValueError, match="sample 's7': turn 0 has no answer to learn"):
        chat.count_tokens([make_sample("s6", ((), "Why?", "So.")), without])
