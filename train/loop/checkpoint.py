"""Checkpoints: the state of an unfinished run, one safetensors file each.

A file holds the trainable parameters and the optimizer's state as tensors, and in its metadata the
number of optimizer steps, the loop's progress, and a hash of everything. The schedule and every
random choice are functions of the step and need no state.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cache.files.atomic import CHUNK_BYTES, canonical_json, replacing
from cache.files.foreign import reading_foreign_file, writing_foreign_file
from train.ranks import object_of_main, tensor_of_main
from train.remote_run import RemoteRun
from workspace.errors import StageError

OPTIMIZER = "optimizer."
PARAMETER = "parameter."


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read from an intact file."""

    path: Path
    step: int
    """Completed optimizer steps."""
    progress: dict[str, Any]
    """The loop's state, as JSON values."""
    tensors: dict[str, Tensor]

    def restore(
        self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> None:
        """Restore the saved state of parameters and optimizer, bit by bit.

        Raises:
            ValueError: The checkpoint is of other parameters, or of another optimizer.
        """
        saved = {PARAMETER + name: parameter for name, parameter in parameters.items()}
        self._check_parameters(saved)
        state = self._optimizer_state([p for g in optimizer.param_groups for p in g["params"]])
        with torch.no_grad():
            for name, parameter in saved.items():
                parameter.copy_(self.tensors[name])
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _check_parameters(self, saved: Mapping[str, nn.Parameter]) -> None:
        # copy_ would broadcast and convert.
        wanted = {name: (p.dtype, tuple(p.shape)) for name, p in saved.items()}
        found = {
            name: (tensor.dtype, tuple(tensor.shape))
            for name, tensor in self.tensors.items()
            if name.startswith(PARAMETER)
        }
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise ValueError(f"{name}: wanted {wanted.get(name)}, found {found.get(name)}")

    def _optimizer_state(self, parameters: Sequence[nn.Parameter]) -> dict[int, dict[str, Tensor]]:
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            if name.startswith(OPTIMIZER):
                _, number, key = name.split(".")
                state.setdefault(int(number), {})[key] = tensor
        for position, values in state.items():
            shape = tuple(parameters[position].shape)
            # AdamW's state.
            wanted = {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
            found = {key: tuple(tensor.shape) for key, tensor in values.items()}
            if found != wanted:
                raise ValueError(f"{OPTIMIZER}{position}: wanted {wanted}, found {found}")
        return state


class Checkpoints:
    """The checkpoints of a run; only the last few are kept, here and behind a URL."""

    def __init__(self, folder: Path, keep: int, remote: RemoteRun | None = None) -> None:
        self._folder, self._keep, self._remote = folder, keep, remote

    @property
    def paths(self) -> list[Path]:
        """Checkpoint files, oldest first."""
        return sorted(self._folder.glob("step-*.safetensors"))

    def save(
        self,
        step: int,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        progress: Mapping[str, Any],
    ) -> Path:
        """Write a checkpoint atomically, then delete the oldest ones."""
        tensors = {PARAMETER + name: _to_save(p) for name, p in parameters.items()}
        for number, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"{OPTIMIZER}{number}.{key}"] = _to_save(value)
        state = {"step": step, "progress": dict(progress)}
        about = {"state": state, "xxh3_128": _hash(state, tensors)}
        path = self._folder / f"step-{step:08}.safetensors"
        # To a file: in memory, safetensors makes two more copies.
        with replacing(path) as temporary, writing_foreign_file(path):
            # One entry: safetensors writes several in random order.
            save_file(tensors, temporary, {"checkpoint": json.dumps(about)})
        for newer in (other for other in self.paths if other > path):
            # A damaged one: the run resumed from a checkpoint before it.
            newer.unlink()
        for old in self.paths[: -self._keep]:
            old.unlink()
        if self._remote:
            self._remote.send_checkpoint(path)
        return path

    def latest(self) -> Checkpoint | None:
        """Read the newest intact checkpoint, from the URL if that has a newer one.

        Damaged ones are reported and left in place.

        Raises:
            OSError: The system cannot read a file, which may be intact.
        """
        found = _first_intact(reversed(self.paths))
        if not self._remote:
            return found
        newest = found.path.name if found else ""
        return _first_intact(self._remote.newer_checkpoints(newest, self._folder)) or found

    def latest_for_all(self) -> Checkpoint | None:
        """Let the main process read the newest intact checkpoint, and give it to all processes.

        The others need no access to its file. Tensors are sent one by one.

        Raises:
            OSError: The system cannot read a file, which may be intact.
            StageError: Another process has ended.
        """
        if PartialState().num_processes == 1:
            return self.latest()
        found = self.latest() if PartialState().is_main_process else None
        header = found and (found.path, found.step, found.progress, _shapes(found.tensors))
        header = object_of_main(header)
        if header is None:
            return None
        path, step, progress, shapes = header
        tensors = {
            name: tensor_of_main(found.tensors[name] if found else torch.empty(shape, dtype=dtype))
            for name, (dtype, shape) in shapes.items()
        }
        return found or Checkpoint(path, step, progress, tensors)


def _first_intact(paths: Iterable[Path]) -> Checkpoint | None:
    for path in paths:
        try:
            return _read(path)
        except StageError as error:
            print(f"{error}; trying the one before", file=sys.stderr)
    return None


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def _read(path: Path) -> Checkpoint:
    with reading_foreign_file(lambda why: StageError(f"{path}: damaged ({why})"), path):
        _read_through(path)
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["checkpoint"])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if _hash(about["state"], tensors) != about["xxh3_128"]:
            raise ValueError("it does not hold what was written")
        return Checkpoint(path, about["state"]["step"], about["state"]["progress"], tensors)


def _read_through(path: Path) -> None:
    """Read the file once: on a failing disk this raises, where a mapped file kills the process."""
    with path.open("rb", buffering=0) as file:
        while file.read(CHUNK_BYTES):
            pass


def _to_save(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").contiguous()


def _hash(state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = xxhash.xxh3_128(canonical_json(state))
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
