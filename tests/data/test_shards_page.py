"""docs/shards.md: a reader written from the page alone reads what the writer writes."""

import json
import re
from pathlib import Path
from typing import Any

from phi3v_data.shard_format import VERSION, Manifest
from phi3v_data.shard_writer import write_shards

from tests.data.test_shard_writer import make_data

PAGE = Path(__file__).resolve().parents[2] / "docs" / "shards.md"


def test_the_reader_of_the_page_reads_every_sample_and_image(tmp_path: Path):
    jsonl = make_data(tmp_path / "data", num=30)
    write_shards([jsonl], tmp_path / "shards", shard_bytes=20_000)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (block,) = (block for block in blocks if "def read(row)" in block)
    names: dict[str, Any] = {"directory": tmp_path / "shards"}
    exec(compile(block, str(PAGE), "exec"), names)

    for row, line in enumerate(jsonl.read_text().splitlines()):
        sample, images = names["read"](row)
        assert sample == json.loads(line)
        paths = sample["conversations"][0]["images"]
        files = [(tmp_path / "data" / "images" / path).read_bytes() for path in paths]
        assert [bytes(image) for image in images] == files


def test_the_page_names_every_key_of_the_manifest_and_its_version():
    page = PAGE.read_text()

    assert f"Format version {VERSION};" in page
    assert [key for key in Manifest.model_fields if f"`{key}`" not in page] == []
