r"""A sample to token ids, labels and image slots.

    user: <|image_1|><|image_2|>\nWhat changed?      assistant: The light.

    piece 1   <s><|user|>\n                                          no loss
              image 1: 313 slots or more                             no loss
    piece 2   <s>                                                    no loss
              image 2                                                no loss
    piece 3   <s>\nWhat changed?<|end|>\n<|assistant|>\n             no loss
              The light.<|end|>\n<|endoftext|>                       labels

The rules are those of the published processor and recipe, one conversation at a time:

* the text is cut at the images; each piece is tokenized alone and starts with BOS, so BOS also
  follows every image, and an empty piece is a lone BOS;
* an answer is tokenized alone, without BOS, its leading white space stripped: `<|assistant|>`
  swallows what white space follows it, so the ids in front of a later turn are those of the
  whole text;
* every answer carries loss up to its `<|end|>`; `<|endoftext|>` follows the last one only.

The tokenizer is the pipeline in `tokenizer.json` as it stands. (transformers 5 rebuilds another
one from `tokenizer_config.json`, with other ids.)
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from jaxtyping import Int64
from numpy.typing import NDArray
from phi3v_data.schema import Sample, Turn
from tokenizers import Tokenizer

from phi3v_train.hd_transform import num_image_tokens

IGNORE_INDEX = -100
"""Label of a position without loss, as in transformers."""

PROMPT_FORMAT_VERSION = 1
"""Raised with every change of the rules above: lengths that were stored are counted again."""

IMAGE_TAG = re.compile(r"<\|image_(\d+)\|>")

_WHITE_SPACE = "".join(
    c for c in map(chr, range(0x3001)) if c.isspace() and not "\x1c" <= c <= "\x1f"
)
"""What `<|assistant|>` swallows: Unicode's White_Space. Python's has four separators more."""


@dataclass(frozen=True, slots=True)
class TokenIds:
    """The special ids of a tokenizer, by name; they differ between the real and a tiny one."""

    bos: int
    end: int
    """`<|end|>`: closes a turn."""
    end_of_text: int
    """`<|endoftext|>`: closes a conversation; also the padding id."""
    image: int
    """`<|image|>`: fills image slots in packed rows."""


@dataclass(frozen=True, slots=True)
class EncodedText:
    """A conversation without pixels: its text pieces, with an image between each two."""

    pieces: tuple[tuple[int, ...], ...]
    """Token ids of the pieces; one more than images."""
    labels: tuple[tuple[int, ...], ...]
    """Aligned with `pieces`; `IGNORE_INDEX` where no loss."""

    @property
    def num_tokens(self) -> int:
        """Text tokens alone."""
        return sum(len(piece) for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Span:
    """A text that is tokenized alone."""

    text: str
    is_learned: bool
    starts_piece: bool
    """BOS comes first."""


class ChatEncoder:
    """Encodes conversations with one tokenizer.

    Args:
        tokenizer_path: a `tokenizer.json`, or the model folder that holds one.

    Raises:
        ValueError: there is no such file, or it lacks a special token of the model.
    """

    def __init__(self, tokenizer_path: str | Path) -> None:
        path = Path(tokenizer_path)
        if not path.exists():
            raise ValueError(f"no model folder at {path}")
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"no tokenizer.json in {path.parent}: is this a model folder?")
        content = path.read_bytes()
        self.fingerprint = xxhash.xxh3_64_hexdigest(content)
        """Hash of `tokenizer.json`."""
        self.tokenizer = Tokenizer.from_buffer(content)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.ids = TokenIds(
            bos=self._special("<s>", path),
            end=self._special("<|end|>", path),
            end_of_text=self._special("<|endoftext|>", path),
            image=self._special("<|image|>", path),
        )
        self._special("<|user|>", path)
        self._special("<|assistant|>", path)

    def _special(self, token: str, path: Path) -> int:
        token_id = self.tokenizer.token_to_id(token)
        if token_id is None:
            raise ValueError(f"{path} has no token {token!r}: it is not a Phi-3-vision tokenizer")
        return token_id

    def encode_text(self, sample: Sample, *, for_generation: bool = False) -> EncodedText:
        """Tokenize a conversation.

        Args:
            sample: the conversation.
            for_generation: stop after the last turn's `<|assistant|>` and leave its answer out.

        Raises:
            ValueError: image marks that don't match the images, or an answer that is missing.
        """
        pieces: list[list[int]] = []
        labels: list[list[int]] = []
        for span in chat_spans(sample, for_generation=for_generation):
            if span.starts_piece:
                pieces.append([self.ids.bos])
                labels.append([IGNORE_INDEX])
            ids = self._tokenize(span.text)
            pieces[-1] += ids
            labels[-1] += ids if span.is_learned else [IGNORE_INDEX] * len(ids)
        return EncodedText(tuple(map(tuple, pieces)), tuple(map(tuple, labels)))

    def count_tokens(self, samples: Sequence[Sample]) -> Int64[NDArray[np.int64], "2 N"]:
        """Text tokens, and tokens that carry loss, of many samples: what `encode_text` would give.

        Each different text is tokenized once, so that a prompt that all samples share costs little.

        Raises:
            ValueError: a sample that cannot be encoded; the message names it.
        """
        spans = [chat_spans(sample) for sample in samples]
        texts = list(dict.fromkeys(span.text for of_sample in spans for span in of_sample))
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        length_of = {
            text: len(encoding.ids) for text, encoding in zip(texts, encodings, strict=True)
        }
        counts = np.empty((2, len(samples)), dtype=np.int64)
        for number, of_sample in enumerate(spans):
            counts[0, number] = sum(length_of[s.text] + s.starts_piece for s in of_sample)
            counts[1, number] = sum(length_of[s.text] for s in of_sample if s.is_learned)
        return counts

    def assemble(
        self, text: EncodedText, grids: Sequence[tuple[int, int]]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Put image slots between the pieces of a text.

        Args:
            text: of `encode_text`.
            grids: (rows, columns) of local crops of every image, in reading order.

        Returns:
            (input_ids, labels), both int64 (T,); slots hold `ids.image` and carry no loss.

        Raises:
            ValueError: as many images as gaps between the pieces are needed.
        """
        if len(grids) != len(text.pieces) - 1:
            raise ValueError(f"expected {len(text.pieces) - 1} images, got {len(grids)}")
        ids, labels = [*text.pieces[0]], [*text.labels[0]]
        for grid, piece, piece_labels in zip(grids, text.pieces[1:], text.labels[1:], strict=True):
            count = num_image_tokens(*grid)
            ids += [self.ids.image] * count
            labels += [IGNORE_INDEX] * count
            ids += piece
            labels += piece_labels
        return np.array(ids, dtype=np.int64), np.array(labels, dtype=np.int64)

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids to text, special tokens left out, outer white space stripped."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()


def chat_spans(sample: Sample, *, for_generation: bool = False) -> list[Span]:
    """The texts of a conversation in order, as they are tokenized.

    Args:
        sample: the conversation.
        for_generation: stop after the last turn's `<|assistant|>` and leave its answer out.

    Raises:
        ValueError: image marks that don't match the images, or an answer that is missing.
    """
    spans: list[Span] = []
    last = len(sample.conversations) - 1
    carried = ""  # text that belongs in front of the next turn's, in the same piece
    for position, turn in enumerate(sample.conversations):
        texts = user_pieces(turn, sample.id)
        texts[0] = carried + "<|user|>\n" + texts[0]
        texts[-1] += "<|end|>\n<|assistant|>\n"
        for number, text in enumerate(texts):
            spans.append(Span(text, is_learned=False, starts_piece=number > 0 or position == 0))
        if for_generation and position == last:
            break
        answer = (turn.assistant or "").lstrip(_WHITE_SPACE)
        if not answer:
            raise ValueError(f"sample {sample.id!r}: turn {position} has no answer to learn")
        spans.append(Span(answer + "<|end|>", is_learned=True, starts_piece=False))
        if position == last:
            spans.append(Span("\n<|endoftext|>", is_learned=True, starts_piece=False))
        carried = "\n"
    return spans


def user_pieces(turn: Turn, sample_id: str = "") -> list[str]:
    """Cut a turn's prompt at its images: one text more than images.

    Without marks the images come first, then a line break and the text. With marks
    (`<|image_k|>`, k from 1 within the turn) every image must be placed exactly once, in order:
    the model fills image features in reading order and ignores the number.

    Raises:
        ValueError: the marks are not exactly 1..n in order.
    """
    marks = [int(number) for number in IMAGE_TAG.findall(turn.user)]
    count = len(turn.images)
    if not marks:
        return ["", *[""] * (count - 1), "\n" + turn.user] if count else [turn.user]
    if marks != list(range(1, count + 1)):
        raise ValueError(
            f"sample {sample_id!r}: expected the marks <|image_1|> to <|image_{count}|> once each, "
            f"in order, got {marks}; place every image of the turn, or none"
        )
    return IMAGE_TAG.split(turn.user)[::2]  # every second piece is a number
