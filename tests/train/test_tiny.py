import json
from pathlib import Path

import pytest
from phi3v_train.tiny import config_fields, init_tiny, train_tokenizer
from tokenizers import Tokenizer

PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "parity" / "phi-3.5-vision"
PIPELINE = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_str(json.dumps(train_tokenizer()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "tiny"
    init_tiny(out, seed=3)
    return out


def published():
    if not PUBLISHED.is_dir():
        pytest.skip("the published model's side files are not beside this checkout")
    return PUBLISHED


def test_training_the_tokenizer_twice_gives_the_same():
    assert train_tokenizer() == train_tokenizer()


def test_the_vocabulary_fills_512_ids_and_fits_the_config():
    content = train_tokenizer()
    tokenizer = Tokenizer.from_str(json.dumps(content))
    assert tokenizer.get_vocab_size() == config_fields(content, 0.02)["vocab_size"] == 512
    assert sorted(tokenizer.get_vocab().values()) == list(range(512))


@pytest.mark.parametrize(
    "text",
    [
        "What is in the image?",
        "  two  spaces",
        "Grüße, 世界 🙂",
        "line\nbreak\n\n",
        "a\tb",
        "0.28 %",
    ],
)
def test_any_text_survives_encoding_and_decoding(tokenizer, text):
    encoded = tokenizer.encode(text)
    assert encoded.tokens[0] == "<s>"
    assert tokenizer.decode(encoded.ids) == text
    assert "<unk>" not in encoded.tokens


def test_known_words_are_few_tokens_and_more_text_makes_more_words_known():
    text = "Grumpf snarks wibble"
    plain = Tokenizer.from_str(json.dumps(train_tokenizer()))
    taught = Tokenizer.from_str(json.dumps(train_tokenizer([text] * 50)))
    assert len(plain.encode("Classify the video").ids) < len("Classify the video") * 2 / 3
    assert len(taught.encode(text).ids) < len(plain.encode(text).ids) / 2


def test_text_of_many_characters_still_leaves_room_for_the_special_tokens():
    text = "".join(chr(code) for code in range(0x4E00, 0x5200))
    content = train_tokenizer([text])
    tokenizer = Tokenizer.from_str(json.dumps(content))
    assert tokenizer.get_vocab_size() == 512
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_line_break_behind_a_turn_is_swallowed_only_by_the_assistant(tokenizer):
    for name, kept in (("<|user|>", True), ("<|end|>", True), ("<|assistant|>", False)):
        ids = tokenizer.encode(f"{name}\nx", add_special_tokens=False).ids
        assert ids[0] == tokenizer.token_to_id(name)
        assert (tokenizer.token_to_id("<0x0A>") in ids) == kept


def test_the_pipeline_is_the_published_one():
    real = json.loads((published() / "tokenizer.json").read_text(encoding="utf-8"))
    ours = train_tokenizer()
    for part in PIPELINE:
        assert ours[part] == real[part], part
    assert ours["model"].keys() - {"ignore_merges"} == real["model"].keys() - {"ignore_merges"}
    flags = [{**token, "id": 0} for token in real["added_tokens"]]
    assert [{**token, "id": 0} for token in ours["added_tokens"]] == flags
    shift = ours["added_tokens"][-1]["id"] - real["added_tokens"][-1]["id"]
    for mine, theirs in zip(ours["added_tokens"][3:], real["added_tokens"][3:], strict=True):
        assert mine["id"] - theirs["id"] == shift


def test_the_side_files_have_the_published_fields(folder):
    for name in ("config", "preprocessor_config", "tokenizer_config", "special_tokens_map"):
        real = json.loads((published() / f"{name}.json").read_text(encoding="utf-8"))
        ours = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        # remote code, SentencePiece settings and provenance have no meaning in this folder
        for key in real.keys() - ours.keys():
            assert key in {
                "_attn_implementation", "_name_or_path", "auto_map", "legacy", "sp_model_kwargs",
                "transformers_version", "use_default_system_prompt",
            }  # fmt: skip
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    real = json.loads((published() / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert tokenizer_config["chat_template"] == real["chat_template"]


def test_transformers_loads_the_tokenizer_with_its_pipeline(folder, tokenizer):
    from transformers import PreTrainedTokenizerFast

    loaded = PreTrainedTokenizerFast.from_pretrained(folder)
    text = "<|user|>\nWhat is in the image?<|end|>\n<|assistant|>\nA red square.<|end|>\n"
    assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
    assert loaded.pad_token_id == loaded.eos_token_id == tokenizer.token_to_id("<|endoftext|>")


def test_transformers_loads_the_model_and_its_ids(folder, tokenizer):
    from phi3v_train.modeling_phi3_v import Phi3VForCausalLM

    model = Phi3VForCausalLM.from_pretrained(folder)
    config = model.config
    assert config.image_token_id == tokenizer.token_to_id("<|image|>")
    assert config.eos_token_id == config.pad_token_id == tokenizer.token_to_id("<|endoftext|>")
    assert tokenizer.token_to_id("<|end|>") in model.generation_config.eos_token_id
    assert 250_000 < sum(parameter.numel() for parameter in model.parameters()) < 350_000
    for width in (
        config.hidden_size,
        config.intermediate_size,
        config.vision_config["hidden_size"],
    ):
        assert width % 64 == 0


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_weights(folder, tmp_path):
    init_tiny(tmp_path / "again", seed=3)
    init_tiny(tmp_path / "other", seed=4)
    for file in sorted(folder.iterdir()):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name
    weights = "model.safetensors"
    assert (folder / weights).read_bytes() != (tmp_path / "other" / weights).read_bytes()


def test_making_a_model_leaves_torchs_random_state_alone(tmp_path):
    import torch

    before = torch.random.get_rng_state()
    init_tiny(tmp_path / "tiny")
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_folder_with_content_is_left_alone(tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "precious").touch()
    with pytest.raises(ValueError, match="exists already; remove it, or name a new folder"):
        init_tiny(tmp_path / "tiny")
    assert [path.name for path in tmp_path.rglob("*")] == ["tiny", "precious"]


def test_an_empty_folder_is_filled_and_nothing_else_is_left(tmp_path):
    (tmp_path / "tiny").mkdir()
    init_tiny(tmp_path / "tiny")
    assert (tmp_path / "tiny" / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
