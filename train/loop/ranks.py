"""What the processes of a run exchange: sums, numbers of each, and barriers."""

import contextlib
from collections.abc import Iterator

from accelerate import PartialState
from accelerate.utils import gather, reduce
from torch import Tensor
from torch.distributed import DistError

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


def gather_of_ranks(tensor: Tensor) -> Tensor:
    """Return the tensors of all processes, joined along their first dimension.

    Raises:
        StageError: Another process has ended.
    """
    with _naming_lost_ranks():
        joined: Tensor = gather(tensor)
    return joined


@contextlib.contextmanager
def _naming_lost_ranks() -> Iterator[None]:
    """Turn the errors of torch.distributed into a line; others, such as a full memory, pass."""
    try:
        yield
    except RuntimeError as error:
        # Those of gloo have no class of their own.
        if not (isinstance(error, DistError) or "gloo" in str(error)):
            raise
        raise StageError(
            f"another process of the run has ended, or cannot be reached ({one_line(error)}). Its "
            f"own message says why. The same command goes on from the last checkpoint."
        ) from None
