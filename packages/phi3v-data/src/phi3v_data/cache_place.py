"""Where shards from object stores are kept on this machine's disk, and how much of it they take.

cache_folder()          # $PHI3V_CACHE/shards, or ~/.cache/phi3v-data/shards
cache_limit()           # $PHI3V_CACHE_LIMIT in bytes, or 50 GB
"""

import os
import re
from pathlib import Path

DEFAULT_LIMIT_BYTES = 50_000_000_000

_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_BINARY_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT]?)(I?)B?)?", re.IGNORECASE)


def cache_folder() -> Path:
    """`$PHI3V_CACHE/shards`; else `$XDG_CACHE_HOME/phi3v-data/shards`; else below `~/.cache`."""
    own = os.environ.get("PHI3V_CACHE", "")
    if own:
        return Path(own).expanduser().absolute() / "shards"
    base = os.environ.get("XDG_CACHE_HOME", "")
    # Relative paths in it are to be ignored, says the XDG specification.
    folder = Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()
    return folder / "phi3v-data" / "shards"


def cache_limit() -> int:
    """`$PHI3V_CACHE_LIMIT` in bytes; else `DEFAULT_LIMIT_BYTES`.

    Raises:
        ValueError: it is no size.
    """
    text = os.environ.get("PHI3V_CACHE_LIMIT", "").strip()
    if not text:
        return DEFAULT_LIMIT_BYTES
    match = _SIZE.fullmatch(text)
    if not match or (match[3] and not match[2]):
        raise ValueError(f"PHI3V_CACHE_LIMIT: expected a size such as 200GB, got {text!r}")
    units = _BINARY_UNITS if match[3] else _UNITS
    return int(float(match[1]) * units[(match[2] or "").upper()])
