"""Lines of a conversations file, damaged in as many ways as lines come damaged, and some more.

    mutator = LineMutator(seed=1)
    mutator.line()      # b'{"id": "a", "source": "toy", "conversations": [{"user": nul...'

The same seed gives the same lines.
"""

import json
import random
from collections.abc import Callable
from typing import Any


def _sample(*turns: dict[str, Any], **fields: Any) -> bytes:
    sample = {"id": "a", "source": "toy", "conversations": list(turns), **fields}
    return json.dumps(sample, ensure_ascii=len(turns) % 2 == 0).encode()


SEEDS = (
    _sample({"user": "What is it?", "assistant": "A cat"}),
    _sample({"images": ["a.png"], "user": "What?", "assistant": "Red", "answers": ["Red", "red"]}),
    _sample(
        {"images": ["a.png", "val/b.png"], "user": "<|image_2|> or <|image_1|>?", "assistant": "é"},
        {"user": "Grüße, 世界 🎈", "assistant": "ok"},
        metadata={"k": 1, "f": -1.5e-7, "t": True, "n": None, "s": "x\n\u2028"},
    ),
    b'{"source":"toy","id":"\\u0061\\ud83c\\udf88","conversations":[{"assistant":"a","user":"u"}]}',
    _sample({"images": ["../secret.png"], "user": "u", "assistant": "a"}, metadata={}),
    _sample({"images": ["link/secret.png", "val\\b.png", "A.PNG"], "user": "u", "assistant": "a"}),
)
"""Valid ones, then ones that lead out of the image root."""

NUM_GOOD = 4
"""Seeds that are valid: the first ones."""

TOKENS: tuple[bytes, ...] = (
    *(b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b'\\"', b'"":', b"[]", b"{}", b",,"),
    *(b"null", b"true", b"false", b"NaN", b"-Infinity", b"0", b"-0", b"01", b"1e400", b"-1e-400"),
    *(b"9" * 400, b"1" * 5000, b"0." + b"3" * 2000, b"1E+", b"-", b".5", b"0x1F"),
    *(b'"id":"a",', b'"user":', b'"images":["a.png"],', b'"answers":["a"],', b'"metadata":{},'),
    *(b"\\u0000", b"\\ud800", b"\\udc00", b"\\ud83c\\udf88", b"\\uZZZZ", b"\\x41", b"\\u00e9"),
    *(b"\x00", b"\x01", b"\x1b[2J", b"\x7f", b"\t", b"\r", b"\x0b", b"\x85", b"\xa0"),
    *(b"\xef\xbb\xbf", b"\xff\xfe", b"\xc0\xaf", b"\xe9", b"\xed\xa0\x80", b"\xf4\x90\x80\x80"),
    *(
        "\u202e".encode(),
        "\u2028".encode(),
        "\ufffe".encode(),
        "e\u0301".encode() * 20,
        "🎈".encode(),
    ),
    *(b"<|end|>", b"<|user|>", b"<s>", b"<|image_1|>", b"<|image_0|>", b"<|placeholder9|>"),
    *(b"<|image_" + b"7" * 5000 + b"|>", b"<|image_18446744073709551616|>", b"<|image_1|>" * 50),
    *(b"../", b"/etc/hostname", b"C:\\\\x", b"a.png", b"./", b"//", b"." * 300, b"%s%n", b"'"),
    *(b"[" * 120, b'{"a":' * 120, b"[" * 20_000, b'{"a":' * 3000, b"]" * 120, b"}" * 120),
    *(b"/*", b"//", b"#", b"<script>", b"$ref", b"__class__", b"=cmd()", b"\\n", b" " * 500),
)


KEYS = (
    *("id", "source", "conversations", "metadata", "images", "user", "assistant", "answers"),
    *("Id", "usr", "text", "", "a/b", "~0", "é", "__proto__", "x" * 300),
)
VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 10**25, 1.5, 1e308, "", " ", "a", "é🎈", "\0", "a\r\nb", "a" * 2000),
    *([], {}, [None], [[]], ["a.png"], ["a.png"] * 40, ["Red"], {"a": 1}, {"user": "u"}),
    *([{"user": "u", "assistant": "a"}], [{"user": "u"}], [{"user": "u", "assistant": "a"}] * 60),
    *("<|end|>", "<|image_1|>", "<|image_2|><|image_1|>", "a.png", "../secret.png", "val/b.png"),
)


class LineMutator:
    """Makes lines; its random numbers are its state."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._ways: tuple[Callable[[bytes], bytes], ...] = (
            self._flip_bit,
            self._flip_bit,
            self._change_byte,
            self._cut,
            self._cut_out,
            self._repeat_part,
            self._splice,
            self._insert_token,
            self._insert_token,
            self._insert_token,
            self._replace_value,
            self._replace_value,
            self._nest,
            self._swap_parts,
            self._change_tree,
            self._change_tree,
            self._change_tree,
            self._change_tree,
        )

    def line(self) -> bytes:
        """One line, without its break; now and then it is a seed as it stands."""
        line = self._random.choice(SEEDS[:NUM_GOOD] if self._random.random() < 0.8 else SEEDS)
        # Mostly one or two mutations: a line with many is only ever not JSON.
        for _ in range(self._random.choice((1, 1, 1, 1, 1, 2, 2, 3, 6))):
            if self._random.random() > 0.03:
                line = self._random.choice(self._ways)(line)
        return line.replace(b"\n", b" ")

    def _place(self, line: bytes) -> int:
        return self._random.randrange(len(line) + 1)

    def _flip_bit(self, line: bytes) -> bytes:
        if not line:
            return line
        k = self._random.randrange(len(line))
        return line[:k] + bytes([line[k] ^ (1 << self._random.randrange(8))]) + line[k + 1 :]

    def _change_byte(self, line: bytes) -> bytes:
        k = self._place(line)
        return line[:k] + bytes([self._random.randrange(256)]) + line[k + 1 :]

    def _cut(self, line: bytes) -> bytes:
        return line[: self._place(line)]

    def _cut_out(self, line: bytes) -> bytes:
        k = self._place(line)
        return line[:k] + line[k + self._random.randrange(20) :]

    def _repeat_part(self, line: bytes) -> bytes:
        start, end = sorted((self._place(line), self._place(line)))
        return line[:end] + line[start:end] * self._random.choice((1, 1, 2, 30)) + line[end:]

    def _splice(self, line: bytes) -> bytes:
        other = self._random.choice(SEEDS)
        return line[: self._place(line)] + other[self._place(other) :]

    def _insert_token(self, line: bytes) -> bytes:
        k = self._place(line)
        return line[:k] + self._random.choice(TOKENS) + line[k:]

    def _replace_value(self, line: bytes) -> bytes:
        """Put a token where a value or a string's beginning is: more often JSON than elsewhere."""
        places = [k for k, byte in enumerate(line) if byte in b':["']
        if not places:
            return line
        k = self._random.choice(places) + 1
        end = k + self._random.choice((0, 0, 1, 4, 8))
        return line[:k] + self._random.choice(TOKENS) + line[end:]

    def _nest(self, line: bytes) -> bytes:
        depth = self._random.choice((1, 2, 95, 200, 2000))
        k = self._place(line)
        return line[:k] + b'{"a":[' * depth + b"]}" * depth + line[k:]

    def _swap_parts(self, line: bytes) -> bytes:
        a, b, c = sorted(self._place(line) for _ in range(3))
        return line[:a] + line[b:c] + line[a:b] + line[c:]

    def _change_tree(self, line: bytes) -> bytes:
        """Change, rename, remove or move a value of a line that is JSON: the schema's share."""
        try:
            root = json.loads(line)
        except (ValueError, RecursionError):
            return line
        value = root
        while isinstance(value, (dict, list)) and value:
            key = self._random.choice(list(value) if isinstance(value, dict) else range(len(value)))
            if not isinstance(value[key], (dict, list)) or self._random.random() < 0.4:
                way = self._random.randrange(4)
                if way == 0 or isinstance(value, list):
                    value[key] = self._random.choice(VALUES)
                elif way == 1:
                    value[self._random.choice(KEYS)] = value.pop(key)
                elif way == 2:
                    del value[key]
                else:
                    value[self._random.choice(KEYS)] = self._random.choice(VALUES)
                break
            value = value[key]
        try:
            return json.dumps(root, ensure_ascii=self._random.random() < 0.5).encode()
        except (ValueError, RecursionError):  # half of a surrogate pair
            return line
