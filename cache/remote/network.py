"""Contacts servers: retries where another attempt can help, and explains failures in one line.

The file systems of fsspec raise the exceptions of their libraries. Those of aiohttp, botocore,
requests and paramiko are not OSErrors, and several hide the true cause behind FileNotFoundError.
No library is imported for its exceptions: they are known by their names.
"""

import errno
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.client import responses
from pathlib import Path
from typing import TypeVar

from ..errors import PatchcacheError, UnreachableStoreError
from ..files.foreign import describe

BACK_OFF = (0.5, 1.0, 2.0)
"""Seconds to wait before the second attempt, the third, ..."""

READ_TIMEOUT = 60.0
"""Seconds without a byte after which a request to a web server fails."""

LEAST_RATE = 16e3
"""Bytes a second, after `READ_TIMEOUT`, below which a request fails."""

REFUSALS = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.PROXY_AUTHENTICATION_REQUIRED)

TEMPORARY = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)
"""Statuses below 500 that can change with another attempt."""

LOCAL_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
)
"""Failures of this machine rather than of the network."""

CUTS = frozenset({"ClientPayloadError", "ServerDisconnectedError", "IncompleteRead"})
"""Exceptions of aiohttp and http.client for a lost connection; they are not ConnectionErrors."""

MAX_CAUSES = 10
"""Most causes in the chain of an exception that are examined."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Fault:
    """A failed request to a server."""

    reason: str
    remedy: str = "Check the address and the network."
    is_missing: bool = False
    """Whether the server answered that there is no such file."""
    is_temporary: bool = True
    """Whether another attempt can help."""


NAMED_FAULTS = {
    **dict.fromkeys(
        ("NoCredentialsError", "PartialCredentialsError"),
        Fault(
            "no login is found on this machine",
            "Log in as its provider says: for S3, `aws configure`, or AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY.",
            is_temporary=False,
        ),
    ),
    **dict.fromkeys(
        ("BadStatusLine", "LineTooLong", "UnknownProtocol"),
        Fault("the server does not speak HTTP", "Check the address and its port."),
    ),
    "RepositoryNotFoundError": Fault(
        "the Hub shows no such repository to this login",
        "Check its name (hf://datasets/<owner>/<name>); if it is private, run `hf auth login`.",
        is_temporary=False,
    ),
    "BucketNotFoundError": Fault(
        "the Hub shows no such bucket to this login",
        "Check its name (hf://buckets/<owner>/<name>); if it is private, run `hf auth login`.",
        is_temporary=False,
    ),
    "GatedRepoError": Fault(
        "the repository is gated: the Hub gives its files to accepted accounts alone",
        "Ask for access on its page, then run `hf auth login` with that account.",
        is_temporary=False,
    ),
    "RevisionNotFoundError": Fault(
        "the repository has no such revision",
        "Check what follows the @, or leave it out.",
        is_temporary=False,
    ),
    "DisabledRepoError": Fault(
        "the Hub has disabled the repository", "Ask its owner.", is_temporary=False
    ),
    "OfflineModeIsEnabled": Fault(
        "HF_HUB_OFFLINE forbids requests to the Hub", "Unset it.", is_temporary=False
    ),
    **dict.fromkeys(
        ("HFValidationError", "HfUriError"),
        Fault(
            "no address on the Hub",
            "Wanted hf://datasets/<owner>/<name> or hf://buckets/<owner>/<name>.",
            is_temporary=False,
        ),
    ),
}
"""Exceptions that no status explains: of botocore without a login, of http.client, and of
huggingface_hub, as the Hub answers 401 and 404 for a private repository and for none."""


def longest(num_bytes: int) -> float:
    """Return the most seconds that a request for so many bytes may take."""
    return READ_TIMEOUT + num_bytes / LEAST_RATE


def attempt(
    action: Callable[[], Result], url: str, folder: Path | None = None, *, retry: bool = True
) -> Result:
    """Run an action over a network, and repeat it after a pause where that can help.

    Args:
        action: Requests the file.
        url: Of the file, for the error text.
        folder: Local folder of the copies, if any: an OSError that names a file in it passes
            unchanged.
        retry: Whether to try more than once.

    Raises:
        FileNotFoundError: The server answers that there is no such file.
        UnreachableStoreError: The server cannot be reached, refuses access, or does not deliver.
        OSError: This machine cannot store the file.
    """
    pauses = (*BACK_OFF, None) if retry else (None,)
    for number, pause in enumerate(pauses, start=1):
        try:
            return action()
        except PatchcacheError:
            raise
        except Exception as error:
            if _is_local(error, folder):
                raise
            fault = fault_of(error)
            if fault.is_missing:
                raise FileNotFoundError(url) from None
            if pause is None or not fault.is_temporary:
                attempts = f" ({number} attempts)" if number > 1 else ""
                raise UnreachableStoreError(
                    f"{url}: {fault.reason}{attempts}. {fault.remedy}"
                ) from None
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def fault_of(error: BaseException) -> Fault:
    """Explain an exception of any file system of fsspec."""
    chain = [error]
    while chain[-1].__cause__ is not None and len(chain) < MAX_CAUSES:
        chain.append(chain[-1].__cause__)
    named = [NAMED_FAULTS[name] for e in chain if (name := type(e).__name__) in NAMED_FAULTS]
    if named:
        return named[0]
    statuses = [status for status in map(_status_of, chain) if status is not None]
    return _fault_of_status(statuses[0]) if statuses else _fault_of_cause(chain)


def _fault_of_status(status: int) -> Fault:
    answer = f"{status} {responses.get(status, 'unknown status')}"
    if status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
        return Fault(answer, is_missing=True, is_temporary=False)
    if status in REFUSALS:
        return _refused(answer)
    is_temporary = status in TEMPORARY or status >= HTTPStatus.INTERNAL_SERVER_ERROR
    remedy = "Try again later." if is_temporary else "Check the address."
    return Fault(f"the server answers {answer}", remedy, is_temporary=is_temporary)


def _fault_of_cause(chain: list[BaseException]) -> Fault:
    cause = chain[-1]
    if isinstance(cause, KeyError) and len(chain) > 1:
        # A file system in memory looks names up.
        cause = chain[-2]
    if isinstance(cause, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return Fault("no such file", is_missing=True, is_temporary=False)
    if isinstance(cause, NotImplementedError):
        return Fault("files there can only be read", "Name another URL.", is_temporary=False)
    if isinstance(cause, PermissionError):
        return _refused(cause.strerror or describe(cause))
    if isinstance(cause, socket.gaierror):
        return Fault(f"the host is not found: {cause.strerror}")
    if isinstance(cause, ConnectionRefusedError):
        return Fault("the host refuses connections", "Check the address, and that it is served.")
    if any(isinstance(error, TimeoutError) for error in chain):
        return Fault("no answer in time", "Check the network, or try again later.")
    if any(isinstance(e, ConnectionError) or type(e).__name__ in CUTS for e in chain):
        return Fault(f"the connection was lost: {describe(cause)}")
    return Fault(f"cannot be read: {describe(cause)}")


def _refused(answer: str) -> Fault:
    remedy = "Check the address and its login."
    return Fault(f"access is refused: {answer}", remedy, is_temporary=False)


def _status_of(error: BaseException) -> int | None:
    """Return the HTTP status in an exception of aiohttp, requests, urllib, botocore or gcsfs."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return _as_status(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
    # The `code` of aiohttp's exceptions is 400 when a connection breaks.
    is_aiohttp = type(error).__module__.partition(".")[0] == "aiohttp"
    names = ["status", "status_code", *["code"] * (not is_aiohttp)]
    found = (
        _as_status(getattr(holder, name, None)) for holder in (error, response) for name in names
    )
    return next((status for status in found if status is not None), None)


def _as_status(value: object) -> int | None:
    if isinstance(value, str) and value.isdecimal() and len(value) == len("404"):
        value = int(value)
    is_status = isinstance(value, int) and HTTPStatus.BAD_REQUEST <= value < 600
    return int(value) if is_status else None  # type: ignore[call-overload]


def _is_local(error: Exception, folder: Path | None) -> bool:
    if not isinstance(error, OSError):
        return False
    if folder is not None and isinstance(error.filename, str):
        return error.errno in LOCAL_ERRORS or Path(error.filename).is_relative_to(folder)
    return error.errno in LOCAL_ERRORS
