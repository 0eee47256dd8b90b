"""The hub of models where it cannot be reached: said at once, with the local cache still in use.

Its own client asks for each of several files six times, and waits half a minute in between.
"""

import contextlib
import logging
from collections.abc import Iterator

from huggingface_hub import constants, get_session

from cache.files.foreign import reading_foreign_file
from cache.texts import one_line
from workspace.errors import StageError

REACH_SECONDS = 10.0
"""How long the hub may take to answer anything at all."""


@contextlib.contextmanager
def reaching_hub() -> Iterator[str]:
    """Give the reason why the hub cannot be reached, or an empty text.

    Where it cannot, its client looks into the local cache alone while the block runs.
    """
    failure = hub_failure()
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = bool(failure)
    try:
        yield failure
    finally:
        constants.HF_HUB_OFFLINE = before


def hub_failure() -> str:
    """Ask the hub for anything once, and return what came in between, or an empty text."""
    try:
        with reading_foreign_file(StageError):
            get_session().head(constants.ENDPOINT, timeout=REACH_SECONDS)
    except (StageError, OSError) as error:
        return one_line(error)
    return ""


@contextlib.contextmanager
def without_logging() -> Iterator[None]:
    """Libraries log nothing in the block: what they raise says it once more."""
    before = logging.root.manager.disable
    logging.disable()
    try:
        yield
    finally:
        logging.disable(before)
