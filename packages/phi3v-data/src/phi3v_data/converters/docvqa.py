r"""DocVQA: questions about scanned pages, with every answer that counts as right.

In, one of:

    spdocvqa_qas/train_v1.0_withQT.json …   # the challenge's annotations: train, val, test; also
    spdocvqa_images/ffbg0227_2.png …        # {train,val,test}/<split>_v1.0.json with documents/

        {"dataset_name": "docvqa", …, "data": [
          {"questionId": 26167, "question": "what is the page no or page mentioned ?",
           "image": "documents/ffbg0227_2.png", "docId": 7467, "ucsf_document_id": "ffbg0227",
           "ucsf_document_page_no": "2", "answers": ["2", "page 2"], "data_split": "val"}, …]}

    DocVQA/validation-00000-of-00006.parquet …   # the hub's exports: columns image, question (or
                                                 # query.en), answers, questionId (or id)
    docvqa/train-00000-of-00002.parquet …        # the Cauldron: images, texts

Out:

    images/documents/ffbg0227_2.png              # from Parquet: images/val/<hash of it>.png
    docvqa_train.jsonl  docvqa_val.jsonl  docvqa_test.jsonl

    {"id": "val-26167", "source": "docvqa", "conversations": [
      {"images": ["documents/ffbg0227_2.png"],
       "user": "what is the page no or page mentioned ?\nAnswer briefly.",
       "assistant": "2", "answers": ["2", "page 2"]}],
     "metadata": {"docId": 7467, "ucsf_document_id": "ffbg0227", "ucsf_document_page_no": "2"}}

All accepted answers are kept as written; `assistant` is the first. The test split has none: its
samples end with the question. Samples come in the order of the annotations. Where both
`train_v1.0.json` and `train_v1.0_withQT.json` are there the latter is read: the questions are the
same, and it has their types. The Cauldron's rows hold their prompts and are taken as they are.

Annotations are read in pieces: memory is bounded however large they are. A row that gives no sample
is named with its reason, and so is the end of a file that is cut off; what is no annotations at all
is refused before anything is written.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, cast

import xxhash

from phi3v_data.converters import About, Item, Rejected
from phi3v_data.converters.cauldron import convert_cauldron_rows, list_cauldron_items
from phi3v_data.converters.json_records import (
    RecordGroup,
    find_list,
    id_reader,
    list_record_groups,
    read_records,
)
from phi3v_data.converters.parquet_rows import (
    ParquetError,
    ParquetFile,
    RowGroup,
    column_names,
    image_bytes,
    list_parquet_files,
    list_row_groups,
    read_rows,
)
from phi3v_data.converters.rows import Row, RowError, SeenIds, canonical_id, show_name, text_field
from phi3v_data.converters.source_images import (
    ImageStore,
    Policy,
    find_image,
    reference_problem,
)
from phi3v_data.schema import MetadataValue, Sample, Turn

SPLITS = ("train", "val", "test")

LAYOUT = (
    "{train,val,test}_v1.0[_withQT].json beside documents/ or spdocvqa_images/, "
    "or Parquet with image and question, or with images and texts"
)

PROMPT = "{question}\nAnswer briefly."

PAGE_FOLDERS = ("documents", "spdocvqa_images", "images")
"""Where pages are looked for by their base name."""

COLUMNS = (
    *("image", "question", "query.en", "answers", "questionId", "id"),
    *("docId", "ucsf_document_id", "ucsf_document_page_no", "question_types"),
)
"""Columns read of the hub's exports."""

IDS_AT_ONCE = 4096

_ANNOTATION = re.compile(r"(train|val|test)(_v[0-9][0-9.]*)?(_withQT)?\.json", re.IGNORECASE)


@dataclass(frozen=True)
class Pages:
    """What an item of an annotation file carries beside its path."""

    records: RecordGroup
    folders: tuple[str, ...]
    """Folders that may hold the pages, nearest first."""


@dataclass(frozen=True)
class PageRows:
    """A row group of a hub export."""

    group: RowGroup
    repeated: int
    """Bit k is set where row k of the group has an id that an earlier row of the split has."""


@dataclass(frozen=True)
class DocVqa:
    """The challenge's JSON, the hub's Parquet exports, or the Cauldron's."""

    about: ClassVar[About] = About(
        "DocVQA",
        "https://rrc.cvc.uab.es/?ch=17",
        "The challenge's terms, for research; the pages are from the UCSF Industry Documents "
        "Library.",
    )

    prompt: str = PROMPT
    """The text of a turn; `{question}` is where the question goes. Rows in the Cauldron's form have
    their own."""

    images: Policy = "copy"
    """How pages reach the output: `copy` the files, `link` them (hard links, which take no
    space), or `reencode` them as JPEG."""

    quality: int = 90
    """JPEG quality of pages that are encoded anew, 1 to 100."""

    def __post_init__(self) -> None:
        from phi3v_data.rules import SPECIAL_TOKEN

        ImageStore(self.images, self.quality)
        if "{question}" not in self.prompt:
            raise ValueError(f"prompt: expected {{question}} somewhere in it, got {self.prompt!r}")
        token = SPECIAL_TOKEN.search(self.prompt)
        if token:
            raise ValueError(f"prompt: {token[0]!r} is a token of the chat format; leave it out")

    @property
    def name(self) -> str:
        """Output files and samples are named after it."""
        return "docvqa"

    def discover(self, source: Path) -> Iterator[Item]:
        """Yield groups of rows: train, val, then test, each in the annotations' order."""
        annotations = _list_annotations(source)
        parquet_files = _only_docvqa(list_parquet_files(source))
        if annotations and parquet_files:
            raise ValueError(
                f"{source} holds annotations ({annotations[0].name}) and Parquet files "
                f"({parquet_files[0].name}); name the one to convert"
            )
        if annotations:
            yield from _list_json_items(annotations, source)
        elif not parquet_files:
            raise ValueError(f"no annotations found in {source}: expected {LAYOUT}")
        elif {"images", "texts"} <= set(column_names(parquet_files[0])):
            yield from list_cauldron_items(parquet_files, ImageStore(self.images, self.quality))
        else:
            if self.images == "link":
                raise ValueError(
                    "images=link: pictures inside a Parquet file have no links; use copy"
                )
            yield from _list_page_items(parquet_files)

    def convert(self, item: Item, out_dir: Path) -> Iterator[Sample | Rejected]:
        """Write the pages of a group of rows and yield their samples."""
        store = ImageStore(self.images, self.quality)
        if isinstance(item.payload, Pages):
            yield from self._convert_json_rows(item, item.payload, out_dir, store)
        elif isinstance(item.payload, PageRows):
            yield from self._convert_page_rows(item, item.payload, out_dir, store)
        else:
            yield from convert_cauldron_rows(item, out_dir, self.name, 1, store)

    def _convert_json_rows(
        self, item: Item, pages: Pages, out_dir: Path, store: ImageStore
    ) -> Iterator[Sample | Rejected]:
        written: dict[str, str] = {}  # several questions a page: it is decoded once
        for row in read_records(pages.records):
            if isinstance(row, Rejected):
                yield row
                continue
            try:
                draft = self._draft(row, item.split)
                name = _page_name(row)
                if name not in written:
                    path = find_image(_page_candidates(name, pages.folders), name)
                    written[name] = store.put(out_dir, name, path, item.key)
            except RowError as error:
                yield Rejected(error.reason, f"{_label(row)}: {error.detail}")
                continue
            yield from draft.rejected
            yield self._sample(draft, written[name])

    def _convert_page_rows(
        self, item: Item, rows: PageRows, out_dir: Path, store: ImageStore
    ) -> Iterator[Sample | Rejected]:
        written: dict[str, str] = {}
        try:
            for k, fields in enumerate(read_rows(rows.group, COLUMNS)):
                row = Row(f"{rows.group.key}, row {k}", _named_as_in_json(fields))
                try:
                    if rows.repeated >> k & 1:
                        raise RowError("duplicate_id", "an earlier row has the same id")
                    draft = self._draft(row, item.split)
                    content = _content(row)
                    digest = xxhash.xxh3_128_hexdigest(content)
                    if digest not in written:
                        written[digest] = store.put_bytes(out_dir, item.split, content, item.key)
                except RowError as error:
                    yield Rejected(error.reason, f"{_label(row)}: {error.detail}")
                    continue
                yield from draft.rejected
                yield self._sample(draft, written[digest])
        except ParquetError as error:
            yield Rejected("damaged_file", str(error))

    def _draft(self, row: Row, split: str) -> "_Draft":
        identity = canonical_id(row.fields.get("questionId"))
        if identity is None:
            got = row.fields.get("questionId")
            raise RowError("bad_row", f"expected a number or text under 'questionId', got {got!r}")
        question = text_field(row, "question").strip()
        answers, rejected = _answers(row)
        if not answers and split != "test":
            raise RowError("no_answer", f"{split} needs answers; only test may lack them")
        return _Draft(
            id=f"{split}-{identity}",
            user=self.prompt.replace("{question}", question),
            answers=answers,
            metadata=_metadata(row),
            rejected=rejected,
        )

    def _sample(self, draft: "_Draft", image: str) -> Sample:
        turn = Turn(
            images=(image,),
            user=draft.user,
            assistant=draft.answers[0] if draft.answers else None,
            answers=draft.answers or None,
        )
        return Sample(
            id=draft.id, source=self.name, conversations=(turn,), metadata=draft.metadata or None
        )


@dataclass(frozen=True)
class _Draft:
    """A sample before its page is written."""

    id: str
    user: str
    answers: tuple[str, ...]
    metadata: dict[str, MetadataValue]
    rejected: tuple[Rejected, ...]
    """Answers left out."""


# --- what a row says ------------------------------------------------------------------------------


def _label(row: Row) -> str:
    """Names a row in messages: where it is, and its question's number."""
    identity = canonical_id(row.fields.get("questionId"))
    return f"{row.where} (questionId {identity:.40})" if identity else row.where


def _answers(row: Row) -> tuple[tuple[str, ...], tuple[Rejected, ...]]:
    """All accepted answers, and what was left out of the list."""
    value = row.fields.get("answers")
    if value is None:
        return (), ()
    if not isinstance(value, list):
        raise RowError("bad_row", f"expected a list under 'answers', got {value!r:.80}")
    answers: list[str] = []
    rejected: list[Rejected] = []
    for k, answer in enumerate(cast("list[object]", value)):
        try:
            answers.append(text_field(Row("", {f"answers[{k}]": answer}), f"answers[{k}]"))
        except RowError as error:
            detail = f"{_label(row)}: {error.detail}; this answer is left out"
            rejected.append(Rejected("bad_answer", detail))
    if rejected and not answers:
        raise RowError("no_answer", f"none of its {len(rejected)} answers is usable text")
    return tuple(answers), tuple(rejected)


def _metadata(row: Row) -> dict[str, MetadataValue]:
    found: dict[str, MetadataValue] = {}
    for key in ("docId", "ucsf_document_id", "ucsf_document_page_no"):
        value = row.fields.get(key)
        if isinstance(value, str | int) and not isinstance(value, bool):
            found[key] = value
    types = row.fields.get("question_types")
    if isinstance(types, list) and types:
        found["question_types"] = ", ".join(str(kind) for kind in cast("list[object]", types))
    return found


def _page_name(row: Row) -> str:
    """The page's name in the output: as the row has it, in `documents/` where it has no folder."""
    value = row.fields.get("image")
    if not isinstance(value, str):
        raise RowError("bad_row", f"expected a path under 'image', got {value!r:.80}")
    problem = reference_problem(value)
    if problem:
        raise RowError("bad_path", f"image {value!r:.120} {problem}")
    path = PurePosixPath(value)
    return str(path) if len(path.parts) > 1 else f"documents/{path}"


def _page_candidates(name: str, folders: tuple[str, ...]) -> list[Path]:
    base_name = PurePosixPath(name).name
    names = dict.fromkeys((name, *(f"{page}/{base_name}" for page in PAGE_FOLDERS), base_name))
    return [Path(folder, candidate) for folder in folders for candidate in names]


def _content(row: Row) -> bytes:
    try:
        return image_bytes(row.fields.get("image"))
    except ValueError as error:
        raise RowError("missing_image", str(error)) from None


def _named_as_in_json(fields: dict[str, Any]) -> dict[str, Any]:
    """A hub row under the challenge's names: some exports have `query.en` and `id`."""
    named = dict(fields)
    query = named.pop("query", None)
    if isinstance(query, dict):
        named.setdefault("question", cast("dict[str, object]", query).get("en"))
    identity = named.pop("id", None)
    named.setdefault("questionId", identity)
    return named


# --- the challenge's JSON -------------------------------------------------------------------------


def _list_annotations(source: Path) -> list[Path]:
    """The annotation file of each split, in `source` or up to two folders down."""
    if source.is_file():
        return [source] if source.suffix.lower() == ".json" else []
    found: dict[str, list[Path]] = {}
    for folder, folders, names in os.walk(source, followlinks=True):  # not endless: see depth
        depth = len(Path(folder).relative_to(source).parts)
        folders[:] = sorted(f for f in folders if depth < 2 and not f.startswith("."))
        for name in sorted(names):
            match = _ANNOTATION.fullmatch(name)
            if match:
                if not Path(folder, name).is_file():  # a pipe would be waited for
                    raise ValueError(f"{name} is no regular file; remove it")
                found.setdefault(match[1].lower(), []).append(Path(folder, name))
    return [_choose(split, found[split], source) for split in SPLITS if split in found]


def _choose(split: str, paths: list[Path], source: Path) -> Path:
    """The file with question types, of two that are the same otherwise."""
    with_types = [path for path in paths if "_withqt" in path.name.lower()]
    plain = {re.sub(r"_withQT", "", path.name, flags=re.IGNORECASE) for path in paths}
    if len(paths) == 1:
        return paths[0]
    if len(paths) == 2 and len(with_types) == 1 and len(plain) == 1:
        return with_types[0]
    names = ", ".join(show_name(path.relative_to(source).as_posix()) for path in paths)
    raise ValueError(f"{source} holds several annotations of {split} ({names}); keep or name one")


def _list_json_items(annotations: list[Path], source: Path) -> Iterator[Item]:
    index = 0
    for path in annotations:
        name = path.name if path == source else path.relative_to(source).as_posix()
        place, header = find_list(path, name, "data")
        # A row that asks nothing takes no id from a later one that does.
        groups = list_record_groups(
            path, name, at=place, id_of=id_reader("questionId", "question", "image")
        )
        folders = _folders_above(path, source)
        split = None
        for group in groups:
            split = split or _split_of(group, header)
            yield Item(index, group.key, group.path, split=split, payload=Pages(group, folders))
            index += 1


def _folders_above(annotation: Path, source: Path) -> tuple[str, ...]:
    """From the annotation file's own folder up to the source; one further for a file alone."""
    top = Path(os.path.abspath(source))
    if top.is_file():
        top = top.parent.parent
    folder = Path(os.path.abspath(annotation)).parent
    return tuple(str(f) for f in (folder, *folder.parents) if f.is_relative_to(top))


def _split_of(group: RecordGroup, header: dict[str, Any]) -> str:
    """The split that the file's name says, or the document, or the first row that says one."""
    match = _ANNOTATION.fullmatch(Path(group.path).name)
    rows = (row.fields.get("data_split") for row in read_records(group) if isinstance(row, Row))
    for said in chain((match and match[1], header.get("dataset_split")), rows):
        split = {"validation": "val"}.get(str(said).lower(), str(said).lower())
        if split in SPLITS:
            return split
    raise ValueError(
        f"{group.name}: expected its name to start with train, val or test, or 'dataset_split' to "
        "say it"
    )


# --- the hub's exports ----------------------------------------------------------------------------


def _only_docvqa(files: list[ParquetFile]) -> list[ParquetFile]:
    """Of a repository of several data sets, what lies in the folder of this one."""
    inside = [f for f in files if "docvqa" in PurePosixPath(f.name.lower()).parts[:-1]]
    return inside or files


def _list_page_items(files: list[ParquetFile]) -> Iterator[Item]:
    columns = {file.name: column_names(file) for file in files}
    for name, found in columns.items():
        if "image" not in found or not {"question", "query"} & set(found):
            raise ValueError(
                f"{name}: expected the columns image and question (or query), or images and texts; "
                f"got {', '.join(found)}"
            )
        if not {"questionId", "id"} & set(found):
            raise ValueError(f"{name}: expected a column questionId or id; got {', '.join(found)}")
    index = 0
    groups = list(list_row_groups(files))
    for split in dict.fromkeys(group.split for group in groups):
        seen = SeenIds()
        for group in groups:
            if group.split == split:
                column = "questionId" if "questionId" in columns[group.name] else "id"
                repeated = seen.add(_ids(group, column))
                payload = PageRows(group, repeated)
                yield Item(index, group.key, group.path, split=split, payload=payload)
                index += 1


def _ids(group: RowGroup, column: str) -> list[str | None]:
    """Each row's id; only that column is read."""
    rows = read_rows(group, (column,), rows_at_once=IDS_AT_ONCE)
    return [canonical_id(fields[column]) for fields in rows]
