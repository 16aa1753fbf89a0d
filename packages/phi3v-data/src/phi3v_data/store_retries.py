"""Asking a store again: what is worth it, how often, after how long.

    content = retry(lambda: file_system.cat_file(path), "s3://b/shard-00000.parquet, bytes 4-903")

Worth it is what may be over in a moment: time-outs, cut and refused connections, answers that end
too soon, the statuses 408, 425, 429 and 5xx. What is missing, forbidden or asked wrongly stays so.

The libraries below (s3fs, botocore, gcsfs, adlfs) try some of these again themselves, a few times
within seconds; what comes here is what outlasted that.
"""

import errno
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from phi3v_data.conversion.trouble import is_machine_trouble
from phi3v_data.shard_format import ShardError

T = TypeVar("T")

_PASSING_STATUSES = frozenset({408, 425, 429})

_PASSING_ERRNOS = frozenset(
    {
        errno.EIO,  # s3fs: a code of the store that it does not know
        121,  # EREMOTEIO, which s3fs makes of InternalError; not on every system
        errno.EBUSY,  # s3fs: SlowDown, ServiceUnavailable
        errno.EAGAIN,
        errno.ETIMEDOUT,
        errno.ECONNRESET,
        errno.ECONNREFUSED,
        errno.ECONNABORTED,
        errno.EPIPE,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENETRESET,
        errno.EHOSTUNREACH,
    }
)

# By name, since the libraries of stores are optional and none is imported for this.
_PASSING_CLASSES = frozenset(
    {
        "HTTPClientError",  # botocore: connections and their time-outs
        "ConnectionError",  # botocore has one of its own; and Python's
        "FlexibleChecksumError",  # botocore: half a body, or one that changed on its way
        "IncompleteReadError",  # botocore, azure
        "ResponseParserError",  # botocore: half an answer
        "ClientConnectionError",  # aiohttp
        "ClientPayloadError",  # aiohttp: a body that ends too soon
        "ServiceRequestError",  # azure: the request did not get there
        "ServiceResponseError",  # azure: the answer did not get here
        "TransportError",  # google.auth, httpx
        "IncompleteRead",  # http.client
    }
)

_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)

# Of its own: ranks that seed the shared one alike would all come back at the same moment, and
# drawing from it would change what they draw next.
_chance = random.SystemRandom()


class ShortRead(EOFError):
    """A store sent fewer bytes than it was asked for."""


class Stopped(Exception):
    """The one who waits for an answer closed the store."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often, and how long to wait in between: `first_wait_s`, then twice as long each time.

    Each wait is shortened by chance, down to a half, so that those who failed together do not come
    back together.
    """

    num_tries: int = 6
    first_wait_s: float = 0.5
    longest_wait_s: float = 10.0

    def wait_s(self, num_failed: int) -> float:
        """Seconds before the next try, after `num_failed` (from 1)."""
        wait = min(self.longest_wait_s, self.first_wait_s * 2 ** (num_failed - 1))
        return wait * _chance.uniform(0.5, 1.0)


def retry(
    ask: Callable[[], T],
    what: str,
    policy: RetryPolicy,
    sleep: Callable[[float], bool] | None = None,
) -> T:
    """What `ask` returns, asked again while its failures are worth it.

    Args:
        ask: a call of a store.
        what: address and range, for messages.
        policy: how often, how long to wait.
        sleep: waits so many seconds; true where the waiting was broken off. By default the clock.

    Raises:
        FileNotFoundError: as the store raised it.
        ShardError: it failed for good; the message gives `what`, the tries, and the last cause.
        Stopped: `sleep` was broken off.
    """
    begun = time.monotonic()
    num_failed = 0
    while True:
        try:
            return ask()
        except FileNotFoundError:
            raise
        except Exception as error:  # every store's library has classes of its own
            num_failed += 1
            if not is_worth_retrying(error):
                raise ShardError(f"{what}: {_reason(error)}{_after(num_failed, begun)}") from error
            if num_failed == policy.num_tries:
                after = _after(num_failed, begun)
                raise ShardError(f"{what}: gave up{after}: {_reason(error)}") from error
        wait_s = policy.wait_s(num_failed)
        if sleep is None:
            time.sleep(wait_s)
        elif sleep(wait_s):
            raise Stopped


def is_worth_retrying(error: BaseException) -> bool:
    """Whether the same request may well be answered in a moment."""
    # First, since aiohttp calls a body that ends too soon a 400, under an error of its connection.
    if any(base.__name__ in _PASSING_CLASSES for base in type(error).__mro__):
        return True
    status = _http_status(error)
    if status is not None:
        return status in _PASSING_STATUSES or status >= 500
    if isinstance(error, _LASTING) or is_machine_trouble(error):
        return False
    if isinstance(error, (TimeoutError, EOFError)):
        return True
    if isinstance(error, OSError):
        # Negative ones are of name resolution; those without are of requests, and of whoever
        # raised a bare OSError for what went wrong on the way.
        return error.errno is None or error.errno < 0 or error.errno in _PASSING_ERRNOS
    return False


def _http_status(error: BaseException | None) -> int | None:
    """The status of the answer an error, or what caused it, was made of; None where none came."""
    while error is not None:
        found: Any = error
        response = getattr(found, "response", None)
        if isinstance(response, dict):  # botocore
            answer: Any = response  # pyright: ignore[reportUnknownVariableType]
            status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            # aiohttp; azure and requests; gcsfs, where it may be text
            names = ("status", "status_code", "code")
            status = next((getattr(found, n) for n in names if hasattr(found, n)), None)
            if status is None and response is not None:
                status = getattr(response, "status_code", None)
        if str(status).isdigit() and 100 <= int(str(status)) < 600:
            return int(str(status))
        error = error.__cause__
    return None


def _reason(error: BaseException) -> str:
    said = (error.strerror if isinstance(error, OSError) else None) or str(error)
    reason = " ".join(said.split()) or type(error).__name__
    is_refused = isinstance(error, PermissionError) or _http_status(error) in (401, 403)
    if is_refused or "redential" in reason:
        return f"no access, check the credentials ({reason})"
    return reason


def _after(num_tries: int, begun: float) -> str:
    if num_tries == 1:
        return ""
    return f" (after {num_tries} tries in {time.monotonic() - begun:.1f} s)"
