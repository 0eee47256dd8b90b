"""What the processes of a run exchange: sums, and barriers."""

import contextlib
from collections.abc import Iterator

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor

from cache.texts import one_line
from workspace.errors import StageError


def wait_for_ranks() -> None:
    """Wait until every process of the run has called this.

    Raises:
        StageError: Another process has ended.
    """
    with _naming_lost_ranks():
        PartialState().wait_for_everyone()


def sum_of_ranks(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes.

    Raises:
        StageError: Another process has ended.
    """
    with _naming_lost_ranks():
        total: Tensor = reduce(tensor, "sum")
    return total


@contextlib.contextmanager
def _naming_lost_ranks() -> Iterator[None]:
    """Turn the error of an exchange into a line, unless it is of this process's own GPU."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except RuntimeError as error:
        raise StageError(
            f"another process of the run has ended, or cannot be reached ({one_line(error)}). Its "
            f"own message says why. The same command goes on from the last checkpoint."
        ) from None
