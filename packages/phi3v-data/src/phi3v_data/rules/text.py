"""T: text."""

import re
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
        marks = [int(match[1]) for match in IMAGE_MARK.finditer(turn.user)]
        if not marks:
            continue
        wanted = range(1, len(turn.images) + 1)
        problems = [
            *(f"<|image_{k}|> has no image" for k in sorted(set(marks)) if k not in wanted),
            *(f"image {k} is placed {marks.count(k)} times" for k in wanted if marks.count(k) > 1),
            *(f"image {k} is not placed" for k in wanted if k not in marks),
        ]
        if problems:
            num_images = len(turn.images)
            yield Finding(
                f"image marks do not match the turn's {num_images} "
                f"image{'' if num_images == 1 else 's'}: {', '.join(problems)}",
                "k counts within the turn; without any mark the images come first",
                f"/conversations/{t}/user",
            )


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
