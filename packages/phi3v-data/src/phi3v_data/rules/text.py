"""T: text."""

import re
from collections import Counter
from collections.abc import Iterator

from phi3v_data.rules.rule import Context, Finding
from phi3v_data.schema import Sample


def empty_answer(sample: Sample, context: Context) -> Iterator[Finding]:
    """An answer is empty or white space only.

    The model would learn to say nothing. A question without an answer, as in test splits, leaves
    `assistant` out.
    """
    for t, turn in enumerate(sample.conversations):
        if turn.assistant is not None and not turn.assistant.strip():
            yield Finding(
                "the answer is empty",
                "leave 'assistant' out where there is no answer",
                f"/conversations/{t}/assistant",
            )
        for k, answer in enumerate(turn.answers or ()):
            if k > 0 and not answer.strip():  # answers[0] is assistant
                yield Finding("the answer is empty", "", f"/conversations/{t}/answers/{k}")


SPECIAL_TOKEN = re.compile(
    r"<\|(?:user|assistant|system|end|endoftext|image|placeholder[0-9]+)\|>|<unk>|</?s>"
)
SHOWN = 10
"""Of what is wrong with the marks of a turn so much is named."""

IMAGE_MARK = re.compile(r"<\|image_([0-9]+)\|>")


def special_token(sample: Sample, context: Context) -> Iterator[Finding]:
    """A text holds a special token of the model.

    `<|user|>`, `<|assistant|>`, `<|system|>`, `<|end|>`, `<|endoftext|>`, `<|image|>`,
    `<|placeholderN|>`, `<s>`, `</s>` and `<unk>` are not text to the tokenizer: they would end a
    turn or open another. An image mark `<|image_k|>` may stand in `user` (see T103), never in an
    answer.
    """
    for t, turn in enumerate(sample.conversations):
        texts = [("user", turn.user), ("assistant", turn.assistant or "")]
        texts += [(f"answers/{k}", text) for k, text in enumerate(turn.answers or ()) if k > 0]
        for key, text in texts:
            tokens = SPECIAL_TOKEN.findall(text)
            if key != "user":
                tokens += [match[0] for match in IMAGE_MARK.finditer(text)]
            for token in dict.fromkeys(tokens):
                yield Finding(
                    f"the text holds {token!r}, a special token of the model",
                    "the chat format adds such tokens itself: remove it",
                    f"/conversations/{t}/{key}",
                )


def image_marks(sample: Sample, context: Context) -> Iterator[Finding]:
    """The marks `<|image_k|>` of a turn do not match its images.

    Without marks the images come before the text. With marks, each image of the turn stands
    exactly once where its mark is; k counts within the turn, from 1.
    """
    for t, turn in enumerate(sample.conversations):
        # Numbers are compared as they are written: some have thousands of digits.
        marks = Counter(match[1].lstrip("0") or "0" for match in IMAGE_MARK.finditer(turn.user))
        if not marks:
            continue
        wanted = [str(k) for k in range(1, len(turn.images) + 1)]
        known = set(wanted)
        unknown = sorted(marks.keys() - known, key=lambda k: (len(k), k))
        problems = [
            *(f"<|image_{_short(k)}|> has no image" for k in unknown),
            *(f"image {k} is placed {marks[k]} times" for k in wanted if marks[k] > 1),
            *(f"image {k} is not placed" for k in wanted if k not in marks),
        ]
        if problems:
            num_images = len(turn.images)
            more = f", and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
            yield Finding(
                f"image marks do not match the turn's {num_images} "
                f"image{'' if num_images == 1 else 's'}: {', '.join(problems[:SHOWN])}{more}",
                "k counts within the turn; without any mark the images come first",
                f"/conversations/{t}/user",
            )


def _short(number: str) -> str:
    return number if len(number) <= 20 else f"{number[:8]}…{number[-8:]}"


def missing_answer(sample: Sample, context: Context) -> Iterator[Finding]:
    """The last turn has no answer.

    There is nothing to learn from it. Test splits have none: `--allow_missing_answer`.
    """
    last = len(sample.conversations) - 1
    if sample.conversations[last].assistant is None and not context.allow_missing_answer:
        yield Finding(
            "the last turn has no 'assistant'",
            "test splits: --allow_missing_answer",
            f"/conversations/{last}",
        )


ODD_CHARACTER = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters, except tab and line break."""


def control_character(sample: Sample, context: Context) -> Iterator[Finding]:
    """A text holds a control character.

    Backspaces, carriage returns, escape sequences, NULs: left over from terminals, Windows files
    and broken decoding. The model reads each as bytes of its own, and learns to write them. Tab and
    line break are text.
    """
    for place, text in _texts(sample):
        found = ODD_CHARACTER.search(text)
        if found:
            number = len(ODD_CHARACTER.findall(text))
            more = f" (and {number - 1} more)" if number > 1 else ""
            yield Finding(
                f"the text holds the control character U+{ord(found[0]):04X}{more}",
                "write line breaks as \\n; remove the others",
                place,
            )


LEAK_CHARS = 40
"""A shorter answer may well be in its question: a class among classes, a word of a sentence."""


def answer_in_question(sample: Sample, context: Context) -> Iterator[Finding]:
    """An answer stands word for word in its question.

    The model learns to copy, and evaluation says it is right. Answers of fewer than 40 characters
    are let be: the question may well list the classes.
    """
    for t, turn in enumerate(sample.conversations):
        answer = turn.assistant or ""
        if len(answer) >= LEAK_CHARS and answer in turn.user:
            yield Finding(
                "the answer stands word for word in the question",
                "",
                f"/conversations/{t}/assistant",
            )


LONG_SAMPLE_CHARS = 100_000
"""About 25,000 tokens of English, beside the images."""


def long_text(sample: Sample, context: Context) -> Iterator[Finding]:
    """A sample has more than 100,000 characters of text.

    That is about 25,000 tokens of English: more than a row of most trainings, and often a file that
    slipped into a field. Training counts tokens, and says before its first step which samples do
    not fit.
    """
    number = sum(len(turn.user) + len(turn.assistant or "") for turn in sample.conversations)
    if number > LONG_SAMPLE_CHARS:
        yield Finding(f"the sample has {number:,} characters of text", "cut it, or split it up")


def _texts(sample: Sample) -> Iterator[tuple[str, str]]:
    """(JSON pointer, text) of every question and answer."""
    for t, turn in enumerate(sample.conversations):
        yield f"/conversations/{t}/user", turn.user
        if turn.assistant is not None:
            yield f"/conversations/{t}/assistant", turn.assistant
        for k, answer in enumerate(turn.answers or ()):
            if k > 0:  # answers[0] is assistant
                yield f"/conversations/{t}/answers/{k}", answer
