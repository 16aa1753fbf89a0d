"""phi3v_data: convert, validate and shard multi-image conversations.

    import phi3v_data

    phi3v_data.convert(MyConverter(), source, out_dir)
    report = phi3v_data.validate(["train.jsonl"])
    shards = phi3v_data.open_shards("shards/train")

Each name is imported from its module when first used, so that `import phi3v_data` loads neither
OpenCV nor pyarrow.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phi3v_data.convert import ConversionResult as ConversionResult
    from phi3v_data.convert import convert as convert
    from phi3v_data.converters import Converter as Converter
    from phi3v_data.converters import Item as Item
    from phi3v_data.converters import Rejected as Rejected
    from phi3v_data.converters import get_converter as get_converter
    from phi3v_data.diagnostics import Diagnostic as Diagnostic
    from phi3v_data.diagnostics import Report as Report
    from phi3v_data.images import decode_image as decode_image
    from phi3v_data.images import probe_image as probe_image
    from phi3v_data.jsonl import JsonlError as JsonlError
    from phi3v_data.jsonl import read_samples as read_samples
    from phi3v_data.jsonl import write_samples as write_samples
    from phi3v_data.schema import Sample as Sample
    from phi3v_data.schema import Turn as Turn
    from phi3v_data.schema import json_schema as json_schema
    from phi3v_data.shard_verify import verify_shards as verify_shards
    from phi3v_data.shard_writer import write_shards as write_shards
    from phi3v_data.shards import Record as Record
    from phi3v_data.shards import ShardError as ShardError
    from phi3v_data.shards import ShardReader as ShardReader
    from phi3v_data.shards import open_shards as open_shards
    from phi3v_data.validate import validate as validate

_HOME = {
    "ConversionResult": "convert",
    "convert": "convert",
    "Converter": "converters",
    "Item": "converters",
    "Rejected": "converters",
    "get_converter": "converters",
    "decode_image": "images",
    "probe_image": "images",
    "JsonlError": "jsonl",
    "read_samples": "jsonl",
    "write_samples": "jsonl",
    "Sample": "schema",
    "Turn": "schema",
    "json_schema": "schema",
    "Record": "shards",
    "ShardError": "shards",
    "ShardReader": "shards",
    "open_shards": "shards",
    "verify_shards": "shard_verify",
    "write_shards": "shard_writer",
    "Diagnostic": "diagnostics",
    "Report": "diagnostics",
    "validate": "validate",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


class _Package(ModuleType):
    """Keeps `phi3v_data.convert` the function, whatever is imported.

    After the import of a submodule Python binds the module to its name in the package.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'phi3v_data' has no attribute {name!r}")
    value = getattr(import_module(f"phi3v_data.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
