"""A tiny random Phi-3.5-vision as a Hugging Face folder: for demos and tests, without a download.

    init_tiny("models/tiny")

    models/tiny/config.json  generation_config.json  model.safetensors
                tokenizer.json  tokenizer_config.json  special_tokens_map.json
                preprocessor_config.json  processor_config.json

Everything is as in the published folder but small: two decoder layers and one computed vision
layer of width 64 (widths stay multiples of 64, which 4-bit quantisation needs), about 300,000
parameters. The tokenizer has the published pipeline and special tokens over 512 ids, trained on
the text below; other characters fall back to bytes. It knows nothing until it is trained.
"""

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3v_data.atomic import TEMPORARY_MARK

_VOCAB_SIZE = 512

_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|assistant|>",
    *(f"<|placeholder{k}|>" for k in range(1, 5)),
    "<|system|>",
    "<|end|>",
    *(f"<|placeholder{k}|>" for k in range(5, 7)),
    "<|user|>",
    *(f"<|placeholder{k}|>" for k in range(7, 40)),
    "<|image|>",
)
"""In the published order; there they have the ids from 32000 on."""

_KEEPS_SPACE_BEHIND = frozenset({"<|endoftext|>", "<|system|>", "<|end|>", "<|user|>"})
"""The other special tokens swallow white space behind them."""

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|' + message['role'] + '|>' + '\n' + message['content']"
    " + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt and messages[-1]['role'] !="
    " 'assistant' %}{{- '<|assistant|>\n' -}}{% endif %}"
)

# The published factors, every third of 48: head_dim / 2 = 16 are needed.
_SHORT_FACTOR = (
    1.08, 1.28, 1.45, 2.43, 3.73, 4.44, 5.16, 5.89,
    6.09, 6.89, 7.19, 7.56, 7.88, 7.94, 8.2, 8.59,
)  # fmt: skip
_LONG_FACTOR = (
    1.08, 1.34, 1.62, 3.23, 7.7, 17.67, 30.42, 32.93,
    50.34, 57.93, 62.61, 63.14, 63.93, 64.03, 64.12, 64.51,
)  # fmt: skip

_SENTENCES = (
    "Classify the video into one of the following classes: ApplyEyeMakeup, ApplyLipstick, Archery,"
    " BabyCrawling, BalanceBeam, BandMarching, BaseballPitch, Basketball, BasketballDunk,"
    " BenchPress.",
    "What is in the image? What is shown in this picture? Describe the two images.",
    "Which of these is different? What has changed between the first and the second image?",
    "A red square moves to the right. A blue square moves to the left.",
    "A green circle moves up and a yellow circle moves down over a black background.",
    "RedLeft, RedRight, BlueLeft, BlueRight, GreenUp, GreenDown, YellowUp, YellowDown.",
    "Is the statement true or false? Answer yes or no. Answer briefly. Yes. No. True. False.",
    "What is the date of the letter? Who is it from? What is the total amount of the table?",
    "The person in the video is walking, running, jumping, playing or doing something else.",
)


@dataclass(frozen=True)
class TinyModel:
    """What was written."""

    path: Path
    num_parameters: int
    vocab_size: int


def init_tiny(
    out_dir: str | os.PathLike[str],
    *,
    seed: int = 0,
    texts: Iterable[str] = (),
    initializer_range: float = 0.05,
) -> TinyModel:
    """Write a tiny random model; the same arguments give the same bytes.

    Args:
        out_dir: the folder to make; it appears when complete.
        seed: of the weights.
        texts: more text to train the tokenizer on, for shorter token sequences.
        initializer_range: standard deviation of the weights.

    Raises:
        ValueError: `out_dir` exists and is not an empty folder.
    """
    target = Path(out_dir)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists already; remove it, or name a new folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(f".{target.name}{TEMPORARY_MARK}{os.getpid()}")
    folder.mkdir()
    try:
        tokenizer = train_tokenizer(texts)
        config = config_fields(tokenizer, initializer_range)
        for name, content in _side_files(tokenizer).items():
            _write_json(folder / name, content)
        num_parameters = _write_model(folder, config, _special_ids(tokenizer)["<|end|>"], seed)
        folder.replace(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return TinyModel(target, num_parameters, config["vocab_size"])


# --- tokenizer -----------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str] = ()) -> dict[str, Any]:
    """Train a byte-pair vocabulary and put it into the published pipeline.

    Returns:
        The content of `tokenizer.json`. Ids: `<unk>`, `<s>`, `</s>`, 256 bytes, the learned
        pieces, then the special tokens from `<|endoftext|>` to `<|image|>`.
    """
    base: dict[str, int] = {}
    for piece in ("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))):
        base[piece] = len(base)
    num_pieces = _VOCAB_SIZE - len(base) - len(_SPECIAL_TOKENS)
    pieces, merges = _learn_pieces([*_SENTENCES, *texts], num_pieces)
    for piece in pieces:
        base[piece] = len(base)

    added = [
        _added_token(0, "<unk>"),
        _added_token(1, "<s>"),
        _added_token(2, "</s>", rstrip=True, special=False),
        *(
            _added_token(len(base) + k, content, rstrip=content not in _KEEPS_SPACE_BEHIND)
            for k, content in enumerate(_SPECIAL_TOKENS)
        ),
    ]
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = [
        {"SpecialToken": {"id": "<s>", "type_id": 1}},
        {"Sequence": {"id": "B", "type_id": 1}},
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, *second],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": base,
            "merges": merges,
        },
    }


def _learn_pieces(texts: list[str], num_pieces: int) -> tuple[list[str], list[list[str]]]:
    """Byte-pair encoding over words: characters first, then merged pieces, and the merges."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    # In training only: it keeps pieces within a word, as in the published vocabulary. A line
    # break is in no piece and stays the single byte <0x0A>, as there.
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("▁", "merged_with_next"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=num_pieces,
        show_progress=False,
        limit_alphabet=num_pieces // 2,
        initial_alphabet=["▁", *(chr(code) for code in range(33, 127))],
    )
    learner.train_from_iterator(
        (f" {line}" for text in texts for line in text.splitlines()), trainer
    )
    model = json.loads(learner.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    return sorted(vocab, key=lambda piece: vocab[piece]), model["merges"]


def _added_token(
    number: int, content: str, *, rstrip: bool = False, special: bool = True
) -> dict[str, Any]:
    return {
        "id": number,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": rstrip,
        "normalized": False,
        "special": special,
    }


# --- the other files -----------------------------------------------------------------------------


def config_fields(tokenizer: dict[str, Any], initializer_range: float) -> dict[str, Any]:
    """The fields of `config.json`, for the ids of this tokenizer."""
    ids = _special_ids(tokenizer)
    num_ids = max(ids.values()) + 1
    return {
        "vocab_size": -(-num_ids // 64) * 64,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {
            "type": "su",
            "short_factor": list(_SHORT_FACTOR),
            "long_factor": list(_LONG_FACTOR),
        },
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "initializer_range": initializer_range,
        "bos_token_id": 1,
        "eos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "image_token_id": ids["<|image|>"],
        "embd_layer": {
            "embedding_cls": "image",
            "hd_transform_order": "sub_glb",
            "projection_cls": "mlp",
            "use_hd_transform": True,
            "with_learnable_separator": True,
        },
        "img_processor": {
            "image_dim_out": 64,
            "model_name": "openai/clip-vit-large-patch14-336",
            "name": "clip_vision_model",
            "num_img_tokens": 144,
        },
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,  # features are read before the last: one is computed
            "num_attention_heads": 2,
        },
    }


def _special_ids(tokenizer: dict[str, Any]) -> dict[str, int]:
    return {token["content"]: token["id"] for token in tokenizer["added_tokens"]}


def _side_files(tokenizer: dict[str, Any]) -> dict[str, Any]:
    names = {
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
    }
    additional = ["<|system|>", "<|end|>", "<|user|>", "<|end|>"]
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {
            "add_bos_token": True,
            "add_eos_token": False,
            "added_tokens_decoder": {
                str(token["id"]): {key: value for key, value in token.items() if key != "id"}
                for token in tokenizer["added_tokens"]
            },
            "additional_special_tokens": additional,
            **names,
            "chat_template": _CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 131072,
            "padding_side": "right",
            "processor_class": "Phi3VProcessor",
            # The published file says LlamaTokenizer, for which transformers 5 rebuilds another
            # pipeline than the one in tokenizer.json.
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        "special_tokens_map.json": {
            "additional_special_tokens": additional,
            **{name: {"content": content, **flags} for name, content in names.items()},
        },
        "preprocessor_config.json": {
            "do_convert_rgb": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_processor_type": "Phi3VImageProcessor",
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "num_crops": 4,
            "num_img_tokens": 144,
            "processor_class": "Phi3VProcessor",
        },
        "processor_config.json": {"processor_class": "Phi3VProcessor"},
    }


def _write_model(folder: Path, fields: dict[str, Any], end_id: int, seed: int) -> int:
    """Write weights, config.json and generation_config.json; return the number of parameters."""
    import torch
    from transformers import GenerationConfig

    from phi3v_train.configuration_phi3_v import Phi3VConfig
    from phi3v_train.model_files import write_model_files
    from phi3v_train.modeling_phi3_v import Phi3VForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Phi3VForCausalLM(Phi3VConfig(**fields))
    model.generation_config = GenerationConfig(
        bos_token_id=fields["bos_token_id"],
        # An answer ends in <|end|>; the published file names 2, which is never generated.
        eos_token_id=[end_id, fields["eos_token_id"]],
        pad_token_id=fields["pad_token_id"],
    )
    write_model_files(model, folder)
    # safetensors writes for the owner alone; the folder's other files show what umask allows.
    mode = (folder / "tokenizer.json").stat().st_mode
    (folder / "model.safetensors").chmod(mode)
    return sum(parameter.numel() for parameter in model.parameters())


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
