"""Addresses: what is not on this machine's disk, `s3://bucket/folder` and whatever fsspec knows.

    file_system, path = open_file_system("s3://bucket/folder")
    with store_errors("s3://bucket/folder"):
        file_system.put_file("a.jpg", f"{path}/a.jpg")

The only import of fsspec.
"""

import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

from phi3v_data.conversion.trouble import StoreError, is_machine_trouble

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure"}


def is_address(path: object) -> bool:
    """Whether it is an address, not a path."""
    return isinstance(path, str) and bool(_ADDRESS.match(path))


def open_file_system(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path within it, without a slash at its end.

    Raises:
        ValueError: nothing here can read such addresses, or it names nothing.
    """
    import fsspec  # pyright: ignore[reportMissingTypeStubs]

    scheme, _, rest = address.partition("://")
    scheme = scheme.lower()
    if scheme in ("file", "local"):
        raise ValueError(f"{address} is on this machine; give its path, {rest}")
    if not rest.strip("/"):
        raise ValueError(f"{address} names no folder; expected something like {scheme}://a/b")
    try:
        # Listings are not cached: another process may have written since.
        found: Any = cast("Any", fsspec).core.url_to_fs(address, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        extra = _EXTRAS.get(scheme)
        remedy = f"; pip install 'phi3v-data[{extra}]'" if extra else ""
        raise ValueError(f"cannot open {address}: {error}{remedy}") from error
    file_system, path = found
    return file_system, str(path).rstrip("/")


@contextmanager
def store_errors(address: str) -> Generator[None]:
    """Turn what a store raises into one kind of error, with the address; but for what is missing.

    Raises:
        StoreError: no permission, no credentials, no connection.
        FileNotFoundError: as the store raised it.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # every store's library has classes of its own
        if is_machine_trouble(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, PermissionError) or "redential" in reason:
            reason = f"no access, check the credentials ({reason})"
        raise StoreError(f"{address}: {reason}") from error


def address_name(address: str | os.PathLike[str]) -> str:
    """Its last part: `UCF101_subset.tar.gz`."""
    return str(address).rstrip("/").rpartition("/")[2]
