r"""Conversations written for other trainers (LLaVA, ShareGPT, OpenAI style), to samples.

In, a `.jsonl` file, a `.json` array, or a folder of them, one file a split, with their media:

    train.json  val.jsonl  images/cats/001.jpg …

LLaVA and Qwen: `image` or `images`, `video` or `videos`, one path or a list; `<image>` and
`<video>` in a text stand for the next one of the list:

    {"id": "1", "image": "cats/001.jpg", "conversations": [
      {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]}

LLaMA-Factory and ms-swift: the same, or with roles; OpenAI and transformers: entries of content:

    {"messages": [{"role": "user", "content": "<image>What is it?"},
      {"role": "assistant", "content": "A cat."}], "images": ["cats/001.jpg"]}
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is it?"},
      {"type": "image_url", "image_url": {"url": "cats/001.jpg"}}]}, …]}

Also read: `conversation` with `{"human": …, "assistant": …}` pairs; `instruction`, `input`,
`output` (or `query`, `response`) with `history`; `system` beside them.

Out:

    images/cats/001.jpg …  images/clips/1.mp4.0.jpg …
    jsonl_train.jsonl  jsonl_val.jsonl

    {"id": "train-0000000000", "source": "jsonl", "conversations": [
      {"images": ["cats/001.jpg"], "user": "What is it?", "assistant": "A cat."}],
     "metadata": {"id": "1"}}

- The number in an id is the record's place in its file, from 0: the files' own ids repeat (those of
  LLaVA's 665k mix do). They are kept in `metadata`; other keys are passed over.
- Media before a turn's text are simply its images. Where one follows text, every image of the turn
  is placed by its mark: `What is it?<|image_1|>`. Without any placeholder, all media come before
  the first turn's text. Otherwise as many placeholders as media, or the record is rejected.
- A video is `num_frames` images; so is a list of frames inside `videos`.
- A system message becomes the first turn's first paragraph, since a sample has no place of its own
  for one (`system="drop"` leaves it out, `reject` rejects the record).
- A last turn without answer is kept in splits whose name starts with `test`, else rejected.
- Paths lead from the file's folder or its `images/` (from a folder given as source, too), or from
  `image_root` alone. An absolute path counts where it is inside one of these.
- Nothing is fetched: pictures behind `http` are rejected by name. `data:` URLs are decoded.

What a sample cannot say is rejected, not guessed at: tool calls, audio, grounding tags, answers
marked as bad or as not to be learned.
"""

import base64
import binascii
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast
from urllib.parse import unquote, urlsplit

from phi3v_data.converters import Item, Rejected
from phi3v_data.converters.clip_folders import (
    SPLITS,
    FrameOptions,
    check_dataset_name,
    check_frame_options,
    read_clip,
)
from phi3v_data.converters.json_records import RecordGroup, list_record_groups, read_records
from phi3v_data.converters.rows import Row, RowError, convert_rows, show_name
from phi3v_data.converters.source_images import (
    ImageStore,
    Policy,
    find_image,
    reference_problem,
    write_image_once,
)
from phi3v_data.schema import Sample, Turn

System = Literal["prepend", "drop", "reject"]

LAYOUT = "*.jsonl (one object a line) or *.json (one array of objects), one file a split"

Kind = Literal["image", "video"]


@dataclass(frozen=True)
class Media:
    """A picture or a video where it stands in a message."""

    kind: Kind
    source: object = None
    """A path, a URL, or for a video a list of paths of frames; None for a placeholder, which stands
    for the next one in the record's list."""


Part = str | Media


@dataclass(frozen=True)
class Message:
    """One message, whatever form it came in."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Records:
    """What an item carries beside its path."""

    group: RecordGroup
    roots: tuple[str, ...]
    """Folders that paths lead from, absolute, the first that has the file."""


@dataclass(frozen=True)
class ChatJsonl(FrameOptions):
    """Files of conversations as other trainers read them."""

    dataset: str = "jsonl"
    """The data set's name: output files start with it, and samples have it as `source`. Letters,
    digits and `_.-`."""

    image_root: str | None = None
    """The folder that paths of pictures and videos lead from; if not given, the annotation file's
    folder or `images/` in it."""

    images: Policy = "copy"
    """How pictures reach the output: `copy` the files, `link` them (hard links, which take no
    space), or `reencode` them as JPEG."""

    system: System = "prepend"
    """What becomes of a system message: `prepend` it to the first question, `drop` it, or `reject`
    the record."""

    def __post_init__(self) -> None:
        check_frame_options(self)
        ImageStore(self.images, self.quality)
        check_dataset_name(self.dataset)
        if self.system not in ("prepend", "drop", "reject"):
            raise ValueError(f"system: expected prepend, drop or reject, got {self.system!r}")

    @property
    def name(self) -> str:
        """Output files and samples are named after it."""
        return self.dataset

    def discover(self, source: Path) -> Iterator[Item]:
        """Yield groups of records: train, val, test, then other files by name."""
        files = _find_files(source)
        index = 0
        for split, path in files:
            roots = self._roots(path, source)
            name = path.name if path == source else path.relative_to(source).as_posix()
            for group in _list_groups(path, name, is_named=path == source):
                payload = Records(group, roots)
                yield Item(index, group.key, group.path, split=split, payload=payload)
                index += 1

    def convert(self, item: Item, out_dir: Path) -> Iterator[Sample | Rejected]:
        """Write the pictures of a group of records and yield their samples."""
        assert isinstance(item.payload, Records)
        shelf = _Shelf(self, item.payload.roots, out_dir, item.key)
        records = read_records(item.payload.group)
        yield from convert_rows(records, lambda record: self._sample(record, item.split, shelf))

    def _sample(self, record: Row, split: str, shelf: "_Shelf") -> Sample:
        fields = record.fields
        _check_supported(fields)
        messages = _place_system(_read_messages(fields), self.system)
        pairs = _pair_up(messages, may_lack_answer=split.startswith("test"))
        questions = _resolve([user for user, _ in pairs], fields)
        medias = [part for parts in questions for part in parts if isinstance(part, Media)]
        shelf.find(medias)  # all before the first is written: half a record leaves nothing behind
        turns: list[Turn] = []
        for parts, (_, answer) in zip(questions, pairs, strict=True):
            images, user = _compose(parts, shelf.put)
            turns.append(Turn(images=images, user=user, assistant=answer))
        native_id = fields.get("id")
        return Sample(
            id=f"{split}-{record.number:010d}",
            source=self.name,
            conversations=tuple(turns),
            metadata={"id": native_id} if isinstance(native_id, str | int) else None,
        )

    def _roots(self, path: Path, source: Path) -> tuple[str, ...]:
        if self.image_root is not None:
            root = os.path.abspath(self.image_root)
            if not os.path.isdir(root):
                raise ValueError(f"image_root: expected a folder, got {self.image_root!r}")
            return (root,)
        folders = [os.path.abspath(path.parent)]
        if source.is_dir() and os.path.abspath(source) not in folders:
            folders.append(os.path.abspath(source))
        return tuple(root for folder in folders for root in (folder, f"{folder}/images"))


# --- files ---------------------------------------------------------------------------------------


def _find_files(source: Path) -> list[tuple[str, Path]]:
    """(split, file) of a file or a folder, or of the one folder in it that has files."""
    if source.is_file():
        return [(_split_name(source), source)]
    files = _list_files(source)
    if not files:
        inside = sorted(p for p in source.iterdir() if p.is_dir() and not p.name.startswith("."))
        folders = [folder for folder in inside if _list_files(folder)]
        if len(folders) > 1:
            names = ", ".join(show_name(folder.name) for folder in folders)
            raise ValueError(f"{source} holds several data sets ({names}); name one")
        files = _list_files(folders[0]) if folders else []
    if not files:
        raise ValueError(f"no annotations found in {source}: expected {LAYOUT}")
    by_split: dict[str, Path] = {}
    for path in files:
        other = by_split.setdefault(_split_name(path), path)
        if other != path:
            names = f"{show_name(other.name)} and {show_name(path.name)}"
            raise ValueError(
                f"{names} would both be split {_split_name(path)!r}: "
                "rename one, or name the file instead of the folder"
            )
    order = {split: k for k, split in enumerate(SPLITS)}
    return sorted(by_split.items(), key=lambda pair: (order.get(pair[0], len(order)), pair[0]))


def _list_groups(path: Path, name: str, *, is_named: bool) -> Iterator[RecordGroup]:
    try:
        yield from list_record_groups(path, name)
    except ValueError as error:
        way_out = "" if is_named else "; to leave it out, name the file to convert as the source"
        raise ValueError(f"{error}{way_out}") from None


def _list_files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in (".jsonl", ".json")
        and not path.name.startswith(".")
        and path.name not in _DESCRIPTIONS
        and path.is_file()
    )


MAX_SPLIT_LENGTH = 100
"""Characters of a file's name that become its split's: output files' names add some."""

_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json")
"""Lists of data sets, of LLaMA-Factory, ms-swift and `datasets`: no records."""


def _split_name(path: Path) -> str:
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", path.stem).lstrip("_.-")[:MAX_SPLIT_LENGTH]
    if not name:
        raise ValueError(f"{path.name!r} gives no name for a split; rename it, as train.jsonl")
    return name


# --- a record's messages -------------------------------------------------------------------------

_ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
}

_PLACEHOLDER = re.compile(r"<(image|video)>")
_GROUNDING = re.compile(r"<(?:bbox|ref-object)>")
_INLINE_PATH = re.compile(r"<img>[^<>]+</img>")


def _check_supported(fields: dict[str, Any]) -> None:
    """Refuse what would change the record's meaning if it were left out."""
    for key in ("audio", "audios"):
        if fields.get(key):
            raise RowError("unsupported_audio", f"{key!r} has {fields[key]!r:.80}")
    if fields.get("tools") not in (None, "", "[]", []):
        raise RowError("unsupported_tools", "'tools' describes tools; the model has no calls")
    for key in ("label", "kto_tag"):
        if fields.get(key) is False:
            raise RowError("bad_answer", f"{key!r} is false: the answer is marked as not wanted")


def _read_messages(fields: dict[str, Any]) -> list[Message]:
    keys = [k for k in ("messages", "conversations", "conversation") if fields.get(k) is not None]
    if len(keys) > 1:
        raise RowError("bad_record", f"expected one conversation, got {' and '.join(keys)}")
    messages: list[Message] = []
    if fields.get("system") not in (None, ""):
        messages.append(_message("system", fields["system"]))
    if not keys:
        return [*messages, *_read_instruction(fields)]
    entries = fields[keys[0]]
    if not isinstance(entries, list) or not entries:
        raise RowError("bad_record", f"expected a list of messages in {keys[0]!r}")
    for entry in cast("list[object]", entries):
        if not isinstance(entry, dict):
            raise RowError("bad_record", f"expected an object for a message, got {entry!r:.80}")
        messages += _read_entry(cast("dict[str, object]", entry))
    return messages


def _read_entry(entry: dict[str, object]) -> Iterator[Message]:
    if "human" in entry and "assistant" in entry:  # ms-swift's pairs
        yield _message("user", entry["human"])
        yield _message("assistant", entry["assistant"])
        return
    if entry.get("tool_calls"):
        raise RowError("unsupported_tools", "a message has 'tool_calls'")
    role = entry.get("from", entry.get("role"))
    keys = ("value", "content", "text")
    content = next((entry[key] for key in keys if entry.get(key) is not None), None)
    if not isinstance(role, str) or content is None:
        got = ", ".join(map(repr, list(entry)[:12]))
        raise RowError("bad_record", f"expected from and value, or role and content; got {got}")
    if role not in _ROLES:
        raise RowError("unsupported_role", f"expected user, assistant or system, got {role!r:.80}")
    message = _message(role, content)
    if message.role == "assistant" and (entry.get("loss") is False or entry.get("weight") == 0):
        raise RowError("unlearned_answer", "an answer is marked as not to be learned")
    yield message


def _read_instruction(fields: dict[str, Any]) -> Iterator[Message]:
    """Alpaca's `instruction`, `input`, `output`, or `query`, `response`; `history` before them."""
    keys = ("instruction", "output") if "instruction" in fields else ("query", "response")
    if keys[0] not in fields:
        known = "conversations, messages, instruction or query"
        got = ", ".join(map(repr, list(fields)[:12]))
        raise RowError("bad_record", f"no conversation: expected {known}; got {got}")
    history: object = fields.get("history") or []
    if not isinstance(history, list):
        raise RowError("bad_record", "expected a list in 'history'")
    for pair in cast("list[object]", history):
        if not isinstance(pair, list) or len(cast("list[object]", pair)) != 2:
            raise RowError("bad_record", "expected pairs of question and answer in 'history'")
        question, answer = cast("list[object]", pair)
        yield _message("user", question)
        yield _message("assistant", answer)
    question, more = fields[keys[0]], fields.get("input")
    if isinstance(question, str) and isinstance(more, str) and more and keys[0] == "instruction":
        question = f"{question}\n{more}" if question else more
    yield _message("user", question)
    if fields.get(keys[1]) is not None:
        yield _message("assistant", fields[keys[1]])


def _message(role: str, content: object) -> Message:
    if isinstance(content, list):
        return Message(_ROLES[role], tuple(_read_content(cast("list[object]", content))))
    if not isinstance(content, str):
        raise RowError("bad_record", f"expected text or a list of content, got {content!r:.80}")
    return Message(_ROLES[role], tuple(_read_text(content)))


def _read_text(text: str) -> Iterator[Part]:
    from phi3v_data.rules import IMAGE_MARK, SPECIAL_TOKEN

    token = SPECIAL_TOKEN.search(text) or IMAGE_MARK.search(text)
    if token:
        raise RowError("special_token", f"a text holds {token[0]!r}, a special token of the model")
    if _GROUNDING.search(text):
        raise RowError("grounding_tags", "a text holds <bbox> or <ref-object>: write them out")
    if _INLINE_PATH.search(text):
        raise RowError("inline_path", "a text holds <img>path</img>: list the path under 'images'")
    if "<audio>" in text:
        raise RowError("unsupported_audio", "a text holds <audio>")
    end = 0
    for match in _PLACEHOLDER.finditer(text):
        yield text[end : match.start()]
        yield Media(cast("Kind", match[1]))
        end = match.end()
    yield text[end:]


def _read_content(entries: list[object]) -> Iterator[Part]:
    """Entries of content, with a line break between two unless both are media."""
    was_text = None
    for entry in entries:
        if isinstance(entry, str):
            entry = {"type": "text", "text": entry}
        if not isinstance(entry, dict):
            raise RowError("bad_record", f"expected an object in a content, got {entry!r:.80}")
        fields = cast("dict[str, object]", entry)
        kind = fields.get("type")
        is_text = kind in ("text", "input_text", "output_text")
        if was_text is not None and (is_text or was_text):
            yield "\n"
        was_text = is_text
        if is_text:
            text = fields.get("text")
            if not isinstance(text, str):
                raise RowError("bad_record", f"expected a text, got {text!r:.80}")
            yield from _read_text(text)
        elif kind in ("image", "image_url", "input_image"):
            yield Media("image", _source_of(fields, ("image", "image_url", "path", "url")))
        elif kind in ("video", "video_url"):
            yield Media("video", _source_of(fields, ("video", "video_url", "path", "url")))
        else:
            raise RowError("unsupported_content", f"content of type {kind!r:.80}")


def _source_of(fields: dict[str, object], keys: Sequence[str]) -> object:
    """What an entry points to; None for an entry that is a placeholder."""
    found = next((fields[key] for key in keys if fields.get(key) not in (None, "")), None)
    if isinstance(found, dict):
        nested = cast("dict[str, object]", found)
        found = next((nested[key] for key in ("url", "path") if nested.get(key)), None)
        if found is None:
            raise RowError("bad_record", f"expected a path or url, got {nested!r:.80}")
    return found


# --- messages to turns ---------------------------------------------------------------------------


def _place_system(messages: list[Message], policy: System) -> list[Message]:
    if any(message.role == "system" for message in messages[1:]):
        raise RowError("bad_roles", "a system message that is not the first")
    if not messages or messages[0].role != "system":
        return messages
    system, *others = messages
    if policy == "drop" or _is_blank(system.parts):
        return others
    if policy == "reject":
        raise RowError("system_message", "the record has a system message")
    if not others or others[0].role != "user":
        return others  # _pair_up says what is wrong
    parts = others[0].parts
    start = _num_leading(parts)
    if any(isinstance(part, Media) for part in (*system.parts, *parts[start:])):
        start = 0  # a text that places its media: it stays one, after the system message
    media = [part for part in parts[:start] if isinstance(part, Media)]
    rest = list(parts[start:])
    if media and rest and isinstance(rest[0], str):
        rest[0] = rest[0].lstrip()
    return [Message("user", (*media, *system.parts, "\n\n", *rest)), *others[1:]]


def _num_leading(parts: Sequence[Part]) -> int:
    """How many parts there are before the first text."""
    places = (k for k, part in enumerate(parts) if isinstance(part, str) and part.strip())
    return next(places, len(parts))


def _pair_up(
    messages: list[Message], *, may_lack_answer: bool
) -> list[tuple[tuple[Part, ...], str | None]]:
    """(question, answer) of each turn."""
    roles = [message.role for message in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2) + ["user"] * (
        len(roles) % 2
    ):
        shown = ", ".join(roles[:6]) + (", …" if len(roles) > 6 else "")
        raise RowError("bad_roles", f"expected user and assistant in turns, got {shown or 'none'}")
    pairs: list[tuple[tuple[Part, ...], str | None]] = []
    for k in range(0, len(messages), 2):
        question = messages[k].parts
        if k + 1 == len(messages):
            if not may_lack_answer:
                raise RowError("no_answer", "the last turn has no answer (a test split may)")
            pairs.append((question, None))
            continue
        answer = messages[k + 1].parts
        if any(isinstance(part, Media) for part in answer):
            raise RowError(
                "media_in_answer", f"the answer of turn {k // 2} holds an image or video"
            )
        text = "".join(part for part in answer if isinstance(part, str))
        if not text.strip():
            raise RowError("empty_answer", f"the answer of turn {k // 2} is blank")
        pairs.append((question, text))
    return pairs


def _resolve(questions: list[tuple[Part, ...]], fields: dict[str, Any]) -> list[tuple[Part, ...]]:
    """Give each placeholder the next source of the record's lists."""
    listed: dict[Kind, list[object]] = {
        "image": _listed(fields, "image", "images"),
        "video": _listed(fields, "video", "videos"),
    }
    open_places: list[str] = [
        part.kind
        for parts in questions
        for part in parts
        if isinstance(part, Media) and part.source is None
    ]
    # LLaVA-Video writes <image> where its one video goes.
    stands_for: dict[str, Kind] = {"image": "image", "video": "video"}
    if not listed["image"] and listed["video"] and "video" not in open_places:
        stands_for["image"] = "video"
    places = [stands_for[kind] for kind in open_places]
    has_own = any(
        isinstance(part, Media) and part.source is not None for parts in questions for part in parts
    )
    waiting: dict[Kind, Iterator[object]] = {}
    front: list[Part] = []
    for kind, sources in listed.items():
        if sources and not places:
            if has_own:
                raise RowError("bad_record", f"{kind}s both in a content and in the record's list")
            front += [Media(kind, source) for source in sources]
        elif len(sources) != places.count(kind):
            raise RowError(
                "placeholders", f"{places.count(kind)} places for {len(sources)} {kind}(s)"
            )
        waiting[kind] = iter(sources)

    def fill(part: Part) -> Part:
        if isinstance(part, str) or part.source is not None:
            return part
        kind = stands_for[part.kind]
        return Media(kind, next(waiting[kind]))

    filled = [tuple(fill(part) for part in parts) for parts in questions]
    filled[0] = (*front, *filled[0])
    for k, parts in enumerate(filled):
        if _is_blank(parts):
            raise RowError("empty_question", f"turn {k} asks nothing")
    return filled


def _listed(fields: dict[str, Any], *keys: str) -> list[object]:
    """The sources under one of `keys`: one, or a list of them."""
    found = {key: fields[key] for key in keys if fields.get(key) not in (None, "", [])}
    if len(found) > 1:
        raise RowError("bad_record", f"expected {' or '.join(keys)}, got both")
    for key, value in found.items():
        values = cast("list[object]", value) if isinstance(value, list) else [value]
        return [
            _source_of({key: source}, (key,)) if isinstance(source, dict) else source
            for source in values
        ]
    return []


def _compose(
    parts: Iterable[Part], put: Callable[[Media], tuple[str, ...]]
) -> tuple[tuple[str, ...], str]:
    """A turn's images and text; marks only where an image follows text."""
    images: list[str] = []
    text = marked = ""
    is_interleaved = False
    for part in parts:
        if isinstance(part, str):
            text += part
            marked += part
            continue
        names = put(part)
        is_interleaved |= bool(text.strip())
        marked += "".join(f"<|image_{len(images) + k}|>" for k in range(1, len(names) + 1))
        images += names
    if is_interleaved:
        return tuple(images), marked
    return tuple(images), text.lstrip() if images else text


def _is_blank(parts: Iterable[Part]) -> bool:
    return all(isinstance(part, str) and not part.strip() for part in parts)


# --- media ---------------------------------------------------------------------------------------


class _Shelf:
    """Takes the media of one item's records over to the output, each once."""

    def __init__(
        self, options: ChatJsonl, roots: tuple[str, ...], out_dir: Path, writer: str
    ) -> None:
        self._options = options
        self._roots = roots
        self._out_dir = out_dir
        self._writer = writer
        self._store = ImageStore(options.images, options.quality)
        self._written: dict[tuple[Kind, str], tuple[str, ...]] = {}

    def find(self, medias: Iterable[Media]) -> None:
        """Check that all are there.

        Raises:
            RowError: one is not, or cannot be read by policy.
        """
        for media in medias:
            if isinstance(media.source, list):
                for frame in self._frames(media):
                    self._locate(Media("image", frame))
            elif isinstance(media.source, str):
                if not media.source.startswith("data:"):
                    self._locate(media)
            else:
                raise RowError("bad_record", f"expected a path, got {media.source!r:.80}")

    def put(self, media: Media) -> tuple[str, ...]:
        """Write a picture, or a video's frames, and return their names.

        Raises:
            RowError: it does not decode.
        """
        if isinstance(media.source, list):
            pictures = (Media("image", frame) for frame in self._frames(media))
            return tuple(name for picture in pictures for name in self.put(picture))
        assert isinstance(media.source, str), "find has looked at it"
        if media.source.startswith("data:"):
            return (self._put_embedded(media),)
        name, path = self._locate(media)
        key = (media.kind, name)
        if key not in self._written:
            put = self._put_picture if media.kind == "image" else self._put_video
            self._written[key] = put(name, path)
        return self._written[key]

    def _put_picture(self, name: str, path: Path) -> tuple[str, ...]:
        if self._options.images == "reencode" and not name.endswith(".jpg"):
            name += ".jpg"  # a.png and a.jpg must not become one file
        return (self._store.put(self._out_dir, name, path, self._writer),)

    def _put_video(self, name: str, path: Path) -> tuple[str, ...]:
        jpegs = read_clip(path, self._options, name)
        if isinstance(jpegs, Rejected):
            raise RowError(jpegs.reason, f"{name}: {jpegs.detail}")
        names = tuple(f"{name}.{k}.jpg" for k in range(len(jpegs)))
        for frame, jpeg in zip(names, jpegs, strict=True):
            write_image_once(self._out_dir, frame, jpeg, self._writer)
        return names

    def _put_embedded(self, media: Media) -> str:
        head, _, payload = cast("str", media.source).partition(",")
        if media.kind != "image" or not head.endswith(";base64"):
            raise RowError("unsupported_content", f"expected a picture in base64, got {head!r:.80}")
        if self._options.images == "link":
            raise RowError("embedded_image", "a picture in a data: URL cannot be linked")
        try:
            content = base64.b64decode(payload, validate=True)
        except (binascii.Error, ValueError) as error:
            raise RowError("bad_image", f"a data: URL is no base64: {error}") from None
        return self._store.put_bytes(self._out_dir, "embedded", content, self._writer)

    def _frames(self, media: Media) -> list[str]:
        """The frames wanted of a video that is a list of its frames."""
        from phi3v_data.video import frame_indices

        frames = cast("list[object]", media.source)
        options = self._options
        if media.kind != "video" or not frames or not all(isinstance(f, str) for f in frames):
            raise RowError(
                "bad_record", f"expected a path or frames of a video, got {frames!r:.80}"
            )
        count = options.num_frames
        if len(frames) < count and options.short == "reject":
            raise RowError("too_short", f"{len(frames)} frames, {count} wanted")
        if options.short == "fewer":
            count = min(count, len(frames))
        seed = f"{options.seed} {frames[0]}"
        places = frame_indices(len(frames), count, options.sampling, seed)
        return [cast("str", frames[place]) for place in places]

    def _locate(self, media: Media) -> tuple[str, Path]:
        """(name in the output, file) of a path below one of the roots."""
        source = cast("str", media.source)
        if source.startswith("file://"):
            source = unquote(urlsplit(source).path)
        elif "://" in source[:12]:
            raise RowError("remote_media", f"{source[:120]!r} is not fetched; download it first")
        for root in self._roots:
            if source.startswith(f"{root.rstrip('/')}/"):
                source = source[len(root.rstrip("/")) + 1 :]
        problem = reference_problem(source)
        if problem:
            way_out = "; image_root can be the folder it is in" if source.startswith("/") else ""
            raise RowError("unsafe_path", f"{source[:120]!r} {problem}{way_out}")
        name = PurePosixPath(source)
        try:
            return str(name), find_image([Path(root, name) for root in self._roots], str(name))
        except RowError as error:
            raise RowError(f"missing_{media.kind}", error.detail) from None
