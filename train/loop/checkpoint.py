"""The state of an unfinished run, in one safetensors file a checkpoint.

A file holds the parameters that learn and the optimizer's state as tensors, and in its metadata
the number of optimizer steps, what the loop wants to find again, and a hash of all of it. The
schedule and every random choice are functions of the step: there is no state of them to keep.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cache.files.atomic import CHUNK_BYTES, canonical_json, replacing
from cache.files.foreign import reading_foreign_file, writing_foreign_file
from workspace.errors import StageError

OPTIMIZER = "optimizer."
PARAMETER = "parameter."


@dataclass(frozen=True)
class Checkpoint:
    """One that was read whole."""

    path: Path
    step: int
    """Optimizer steps made."""
    progress: dict[str, Any]
    """What the loop remembered, as JSON holds it."""
    tensors: dict[str, Tensor]

    def restore(
        self, learning: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> None:
        """Put parameters and optimizer back into the state that was saved, bit by bit.

        Raises:
            ValueError: It was saved of other parameters, or of another optimizer.
        """
        saved = {PARAMETER + name: parameter for name, parameter in learning.items()}
        self._check_parameters(saved)
        state = self._optimizer_state([p for g in optimizer.param_groups for p in g["params"]])
        with torch.no_grad():
            for name, parameter in saved.items():
                parameter.copy_(self.tensors[name])
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _check_parameters(self, saved: Mapping[str, nn.Parameter]) -> None:
        # PyTorch would stretch and convert what does not fit.
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
            # Of AdamW.
            wanted = {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
            found = {key: tuple(tensor.shape) for key, tensor in values.items()}
            if found != wanted:
                raise ValueError(f"{OPTIMIZER}{position}: wanted {wanted}, found {found}")
        return state


class Checkpoints:
    """The checkpoints of one run: the last ones are kept, older ones are deleted."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep

    @property
    def paths(self) -> list[Path]:
        """Files that are there, the oldest first."""
        return sorted(self._folder.glob("step-*.safetensors"))

    def save(
        self,
        step: int,
        learning: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        progress: Mapping[str, Any],
    ) -> Path:
        """Write a checkpoint, whole or not at all, then delete the oldest ones."""
        tensors = {PARAMETER + name: _to_save(p) for name, p in learning.items()}
        for number, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"{OPTIMIZER}{number}.{key}"] = _to_save(value)
        state = {"step": step, "progress": dict(progress)}
        about = {"state": state, "xxh3_128": _hash(state, tensors)}
        path = self._folder / f"step-{step:08}.safetensors"
        # Straight from the tensors to the file: in memory, safetensors makes two more copies.
        with replacing(path) as temporary, writing_foreign_file(path):
            # One entry: safetensors writes several in an order that changes from run to run.
            save_file(tensors, temporary, {"checkpoint": json.dumps(about)})
        for newer in (other for other in self.paths if other > path):
            # Damaged, or the run would not have gone on from before it.
            newer.unlink()
        for old in self.paths[: -self._keep]:
            old.unlink()
        return path

    def latest(self) -> Checkpoint | None:
        """Read the newest checkpoint that is whole; damaged ones are named, and left there.

        Raises:
            OSError: The system cannot read one, which says nothing about what is in it.
        """
        for path in reversed(self.paths):
            try:
                return _read(path)
            except StageError as error:
                print(f"{error}; trying the one before", file=sys.stderr)
        return None


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
    """Meet a failing disk where it is an error: in a mapped file, it would end the process."""
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
