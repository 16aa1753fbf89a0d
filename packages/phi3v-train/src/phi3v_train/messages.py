r"""The field's message format to the strings and pictures that the published processor takes.

    [{"role": "user", "content": [{"type": "image", "path": "a.jpg"},
                                  {"type": "image", "path": "b.jpg"},
                                  {"type": "text", "text": "What changed?"}]}]

    ->  [{"role": "user", "content": "<|image_1|><|image_2|>\nWhat changed?"}],  ["a.jpg", "b.jpg"]

Pictures are numbered over the whole conversation. Those in front of a message's text stand in one
line before it, as in training; those within or behind the text stand where they are, with nothing
added. Content that is a string already is left alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phi3v_train.chat import IMAGE_TAG

_SOURCE_KEYS = ("image", "path", "url", "base64")
"""Where an image entry may hold its picture, as in transformers."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation in the published form."""

    messages: list[dict[str, Any]]
    """As given, every `content` a string with `<|image_1|>` ... `<|image_n|>`."""
    images: list[Any]
    """The pictures of image entries, in order; empty where the entries name none."""


def render_messages(messages: Sequence[Mapping[str, Any]]) -> Rendered:
    """Write the image entries of a conversation as tags, and collect their pictures.

    Args:
        messages: `{"role": ..., "content": string or list of entries}`; an entry is
            `{"type": "text", "text": ...}`, `{"type": "image"}` with its picture under `image`,
            `path`, `url` or `base64`, or without one where the pictures are given apart, or
            OpenAI's `{"type": "image_url", "image_url": {"url": ...}}`.

    Raises:
        ValueError: another kind of entry; some image entries with a picture and some without;
            image entries and written tags in one conversation.
    """
    rendered: list[dict[str, Any]] = []
    images: list[Any] = []
    num_entries = 0
    has_written_tags = False
    if isinstance(messages, Mapping):
        raise ValueError("expected a list of messages, got one message; put it in a list")
    for position, message in enumerate(messages):
        if "role" not in message or "content" not in message:
            raise ValueError(
                f"message {position}: expected the keys role and content, got {sorted(message)}"
            )
        content = message["content"]
        if isinstance(content, str):
            has_written_tags |= IMAGE_TAG.search(content) is not None
            rendered.append({**message})
            continue
        if not isinstance(content, list | tuple):
            raise ValueError(
                f"message {position}: expected content to be a string or a list of entries, got "
                f"{type(content).__name__}"
            )
        text = ""
        is_leading = True
        for entry in content:
            kind = entry.get("type") if isinstance(entry, Mapping) else None
            if kind == "text" and isinstance(entry.get("text"), str):
                has_written_tags |= IMAGE_TAG.search(entry["text"]) is not None
                text += ("\n" if is_leading and text else "") + entry["text"]
                is_leading = False
            elif kind in ("image", "image_url"):
                num_entries += 1
                text += f"<|image_{num_entries}|>"
                images += _pictures(entry, position)
            else:
                raise ValueError(
                    f"message {position}: expected entries of type text or image, got {entry!r}"
                )
        rendered.append({**message, "content": text})
    if num_entries and has_written_tags:
        raise ValueError(
            "the conversation has image entries and written tags such as <|image_1|>; use one of "
            "the two, so that the numbers are sure"
        )
    if images and len(images) != num_entries:
        raise ValueError(
            f"{len(images)} of {num_entries} image entries hold a picture; give all of them one, "
            "or none and pass the pictures as images="
        )
    return Rendered(rendered, images)


def _pictures(entry: Mapping[str, Any], position: int) -> list[Any]:
    if entry["type"] == "image_url":
        address = entry.get("image_url")
        address = address.get("url") if isinstance(address, Mapping) else address
        if not isinstance(address, str):
            raise ValueError(
                f'message {position}: expected "image_url": {{"url": "https://..."}}, got '
                f"{sorted(entry)}"
            )
        return [address]
    found = [entry[key] for key in _SOURCE_KEYS if entry.get(key) is not None]
    if len(found) > 1:
        raise ValueError(
            f"message {position}: an image entry holds one picture, got {sorted(entry)}"
        )
    if entry.get("base64") is None:
        return found
    code = entry["base64"]
    if not isinstance(code, str):
        raise ValueError(
            f"message {position}: expected base64 to be a string, got {type(code).__name__}; raw "
            "bytes go under the key image"
        )
    return [f"data:;base64,{code.partition(',')[2] or code}"]
