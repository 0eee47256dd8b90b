"""The model hub, when it cannot be reached: a failure within seconds, and the local cache in use.

The hub's own client asks for each of several files six times, with half a minute in between.
"""

import contextlib
import logging
from collections.abc import Iterator

from huggingface_hub import constants, get_session

from cache.files.foreign import reading_foreign_file
from cache.texts import one_line
from workspace.errors import StageError

REACH_SECONDS = 10.0
"""Time that the hub gets to answer anything at all."""


@contextlib.contextmanager
def offline_if_hub_unreachable() -> Iterator[str]:
    """Let the hub's client use its local cache alone in the block if the hub cannot be reached.

    Yields:
        Why the hub cannot be reached; empty if it can.
    """
    failure = hub_failure()
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = bool(failure)
    try:
        yield failure
    finally:
        constants.HF_HUB_OFFLINE = before


def hub_failure() -> str:
    """Send the hub one request; return why it failed, or an empty text."""
    try:
        with reading_foreign_file(StageError):
            get_session().head(constants.ENDPOINT, timeout=REACH_SECONDS)
    except (StageError, OSError) as error:
        return one_line(error)
    return ""


@contextlib.contextmanager
def logging_disabled() -> Iterator[None]:
    """Disable all logging in the block: the exceptions of the libraries say the same again."""
    before = logging.root.manager.disable
    logging.disable()
    try:
        yield
    finally:
        logging.disable(before)
