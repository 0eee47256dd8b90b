"""Collectives of a distributed run (sum, gather, broadcast), and the check that all ranks have the
same inputs.

The processes may be on several machines, without a shared folder.
"""

import contextlib
import os
import socket
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list, gather, gather_object, reduce
from torch import Tensor
from torch.distributed import DistError

from cache.texts import one_line
from workspace.errors import StageError

NEW_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Variable of torchrun's environment: 1 lets the processes find each other anew after a restart.

Otherwise they read the addresses that the processes before them left in torchrun's store, and wait
for half an hour (torch 2.15)."""


def check_restarts() -> None:
    """Refuse a torchrun whose restarts would hang.

    Raises:
        StageError: Names the variable to set.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise StageError(
            f"torchrun --max-restarts {restarts}: processes that it starts again would wait for "
            f"those that ended. Set {NEW_STORE}=1 in its environment, on every machine."
        )


def num_restarts() -> int:
    """Return how often torchrun has restarted the processes: the most that any of them knows.

    The torchrun of a machine counts the deaths of its own processes alone.

    Raises:
        StageError: Another process has ended.
    """
    own = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    with naming_lost_ranks():
        counts: list[int] = gather_object([own])
    return max(counts)


def sum_of_ranks(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes.

    Raises:
        StageError: Another process has ended.
    """
    with naming_lost_ranks():
        total: Tensor = reduce(tensor, "sum")
    return total


def gather_of_ranks(tensor: Tensor) -> Tensor:
    """Return the tensors of all processes, joined along their first dimension.

    Raises:
        StageError: Another process has ended.
    """
    with naming_lost_ranks():
        joined: Tensor = gather(tensor)
    return joined


def object_of_main(value: Any) -> Any:
    """Return the main process's value in every process; it must be picklable.

    Raises:
        StageError: Another process has ended.
    """
    with naming_lost_ranks():
        (found,) = broadcast_object_list([value])
    return found


def tensor_of_main(tensor: Tensor) -> Tensor:
    """Return the main process's tensor in every process, bit by bit, in main memory.

    Args:
        tensor: In the other processes, any tensor of the same shape and dtype.

    Raises:
        StageError: Another process has ended.
    """
    # As bytes, because not every backend sends every dtype.
    data = tensor.contiguous().reshape(-1).view(torch.uint8).to(PartialState().device)
    with naming_lost_ranks():
        data = broadcast(data)
    found: Tensor = data.cpu().view(tensor.dtype).reshape(tensor.shape)
    return found


def check_same_inputs(inputs: Mapping[str, Any]) -> None:
    """Compare what decides the numbers of a run between its processes.

    Args:
        inputs: Names of settings, files, code and libraries to their values or hashes.

    Raises:
        StageError: In every process, if two differ; names entries, machines and processes.
    """
    processes = PartialState()
    if processes.num_processes == 1:
        return
    place = f"process {processes.process_index} ({socket.gethostname()})"
    with naming_lost_ranks():
        found = gather_object([(place, dict(inputs))])
    if differing := _differences(found):
        raise StageError(
            f"the processes of the run have different inputs: {'; '.join(differing)}. Give every "
            f"machine the same settings, code, data and models (`git pull`, `dvc pull`), and start "
            f"again."
        )


def _differences(found: list[tuple[str, dict[str, Any]]]) -> list[str]:
    differing = []
    for name in sorted({name for _, inputs in found for name in inputs}):
        places = defaultdict(list)
        for place, inputs in found:
            places[str(inputs.get(name, "none"))].append(place)
        if len(places) > 1:
            values = (f"{value} in {', '.join(names)}" for value, names in places.items())
            differing.append(f"{name} is {', but '.join(values)}")
    return differing


@contextlib.contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """Turn the errors of torch.distributed into a line; others, such as a full memory, pass."""
    try:
        yield
    except RuntimeError as error:
        # Those of gloo have no class of their own.
        if not (isinstance(error, DistError) or "gloo" in str(error).lower()):
            raise
        raise StageError(
            f"another process of the run has ended, or cannot be reached ({one_line(error)}). Its "
            f"own message says why. The same command goes on from the last checkpoint; torchrun "
            f"with --max-restarts does so by itself."
        ) from None
