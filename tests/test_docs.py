"""The documentation against the code: file tree, command lines, settings, links."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from phi3v_data.cli import main as phi3v_data
from phi3v_data.rules import RULES
from phi3v_train.cli import main as phi3v_train
from phi3v_train.config import TrainConfig
from phi3v_train.hd_transform import hd_layout
from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = {"phi3v-data": phi3v_data, "phi3v-train": phi3v_train}
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("packages/*/README.md"),
    ]
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


# --- the file tree --------------------------------------------------------------------------------


def tree_entries() -> set[str]:
    """Every file and folder that the README's tree names."""
    section = (ROOT / "README.md").read_text().split("## Files\n", 1)[1]
    match = FENCE.search(section)
    assert match is not None
    folders: list[tuple[int, str]] = []  # indentation and path of the folders around a line
    entries: set[str] = set()
    for line in match[2].splitlines():
        if not line.strip():
            continue
        depth = len(line) - len(line.lstrip())
        while folders and folders[-1][0] >= depth:
            folders.pop()
        base = folders[-1][1] if folders else ""
        for name in names_of(line, is_first_column_only="   " in line.strip()):
            entries.add(base + name)
            if name.endswith("/"):
                folders.append((depth, base + name))
    return entries


def names_of(line: str, *, is_first_column_only: bool) -> list[str]:
    """`chat.py    a sample to ids` -> one name; `README.md  LICENSE` -> two."""
    text = re.split(r" {3,}", line.strip())[0] if is_first_column_only else line.strip()
    first = text.split("  ")
    return [name for name in first if " " not in name]


def source_files() -> set[str]:
    patterns = (
        "packages/*/src/*/*.py", "packages/*/src/*/*/*.py", "packages/*/src/*/py.typed",
        "packages/*/README.md", "packages/*/pyproject.toml", "examples/*.py", "docs/*.md",
        "tests/test_*.py", "*.md", "LICENSE", "pyproject.toml", "uv.lock",
        ".pre-commit-config.yaml", ".ci/run",
    )  # fmt: skip
    found = (path for pattern in patterns for path in ROOT.glob(pattern))
    return {str(path.relative_to(ROOT)) for path in found}


def test_the_tree_of_the_readme_names_every_source_file() -> None:
    missing = source_files() - tree_entries()
    assert not missing, f"the README's tree lacks {sorted(missing)}"


def test_the_tree_of_the_readme_names_nothing_that_is_not_there() -> None:
    entries = tree_entries()
    assert "packages/phi3v-data/src/phi3v_data/converters/ucf101.py" in entries
    gone = {entry for entry in entries if not (ROOT / entry).exists()}
    assert not gone, f"the README's tree names {sorted(gone)}"


# --- commands -------------------------------------------------------------------------------------


def documented_commands() -> Iterator[tuple[str, str]]:
    """(page, command line) of every call of our programs in a fenced block."""
    for page in PAGES:
        for _, block in FENCE.findall(page.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True) if line.startswith("phi3v-") else []
                if words and words[0] in PROGRAMS:
                    yield page_name(page), shlex.join(words)


COMMANDS = sorted(
    {
        (page, line)
        for page, line in documented_commands()
        # Converters that a page shows exist where its commands are run: test_docs_conversion.py.
        if not re.match(r"phi3v-data convert \w+:\w+ ", line)
    }
)


def parse(words: list[str]) -> tuple[click.Command, click.Context]:
    """Parse a command line down to its last subcommand, without running anything."""
    command: click.Command = PROGRAMS[words[0]]
    context: click.Context | None = None
    rest = words[1:]
    while isinstance(command, click.Group):
        context = command.make_context(command.name, rest, parent=context)
        name, found, rest = command.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        assert found is not None, name
        command = found
    return command, command.make_context(command.name, rest, parent=context)


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_documented_command_line_parses(
    page: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)
    for word in words:  # files that a command wants to see
        path = Path(word)
        if word.endswith(".jsonl"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        elif "/" in word and "=" not in word:
            path.mkdir(parents=True, exist_ok=True)
    _, context = parse(words)
    for setting in context.params.get("arguments", ()):
        if "=" in setting:
            key = setting.partition("=")[0]
            assert key in SETTINGS, f"{page}: no setting {key!r}"


def test_the_readme_shows_the_whole_path() -> None:
    shown = {" ".join(line.split()[:2]) for page, line in COMMANDS if page == "README.md"}
    commands = {f"phi3v-data {name}" for name in ("convert", "validate", "shard", "verify")}
    assert commands | {f"phi3v-train {name}" for name in ("init", "launch", "eval")} <= shown


def test_the_first_block_of_the_readme_is_the_two_commands() -> None:
    match = FENCE.search((ROOT / "README.md").read_text())
    assert match is not None
    assert match[2].splitlines() == [
        "pip install uv && uv run examples/quickstart.py",
        "uv run pytest",
    ]
    assert "uv run pytest" in (ROOT / ".ci/run").read_text().splitlines()


def test_the_readme_counts_the_rules() -> None:
    assert f"{len(RULES)} validation rules" in (ROOT / "README.md").read_text()


# --- settings -------------------------------------------------------------------------------------


def settings_of(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(key, default, description) of every setting, as docs/training.md shows them."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from settings_of(field.annotation, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
        yield f"{prefix}{name}", default, " ".join((field.description or "").split())


SETTINGS = {key: (default, text) for key, default, text in settings_of(TrainConfig)}


def test_the_table_of_settings_is_that_of_the_code() -> None:
    rows = [f"| `{key}` | {default} | {text} |" for key, (default, text) in SETTINGS.items()]
    page = (ROOT / "docs" / "training.md").read_text()
    shown = [line for line in page.splitlines() if re.match(r"\| `[a-z_.]+` \| (`|required)", line)]
    assert shown == rows, "put this into docs/training.md:\n" + "\n".join(rows)


# --- numbers and links ----------------------------------------------------------------------------


def test_the_worked_example_of_the_model_page_is_right() -> None:
    page = (ROOT / "docs" / "model.md").read_text()
    for num_crops in (1, 4, 16):
        layout = hd_layout(640, 480, num_crops)
        (height, width), (rows, columns) = layout.resized_hw, layout.grid
        canvas_height, canvas_width = layout.canvas_hw
        row = (
            f"| {num_crops} | {width} x {height} | {canvas_width} x {canvas_height} "
            f"| {rows} x {columns} | {layout.num_tokens:,} |"
        )
        assert row in page, f"put this into docs/model.md:\n{row}"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page_name(page)}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", t).strip().lower().replace(" ", "-") for t in titles}
            assert anchor in anchors, f"{page_name(page)}: {target}"


# --- code -----------------------------------------------------------------------------------------


def test_the_python_of_the_model_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from phi3v_train.tiny import init_tiny
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    init_tiny("models/tiny")
    Image.new("RGB", (400, 300), "red").save("a.jpg")
    Image.new("RGB", (300, 400), "blue").save("b.jpg")
    page = (ROOT / "docs" / "model.md").read_text()
    blocks = [block for language, block in FENCE.findall(page) if language == "python"]
    assert len(blocks) == 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/model.md", "exec"), names)
    assert isinstance(names["answer"], str)
