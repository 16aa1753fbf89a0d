"""Addresses: what is not on this machine's disk, `s3://bucket/folder` and whatever fsspec knows.

The only import of fsspec.
"""

import os
import re
from typing import Any, cast

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure"}


def is_address(path: object) -> bool:
    """Whether it is an address, not a path."""
    return isinstance(path, str) and bool(_ADDRESS.match(path))


def open_file_system(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path within it, without a slash at its end.

    Raises:
        ValueError: nothing here can read such addresses.
    """
    import fsspec  # pyright: ignore[reportMissingTypeStubs]

    scheme = address.partition("://")[0].lower()
    try:
        found: Any = cast("Any", fsspec).core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        extra = _EXTRAS.get(scheme)
        remedy = f"; install phi3v-data[{extra}]" if extra else ""
        raise ValueError(f"cannot open {address}: {error}{remedy}") from error
    file_system, path = found
    return file_system, str(path).rstrip("/")


def address_name(address: str | os.PathLike[str]) -> str:
    """Its last part: `UCF101_subset.tar.gz`."""
    return str(address).rstrip("/").rpartition("/")[2]
