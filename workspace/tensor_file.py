"""Reads the header of a safetensors file, before any tensor is allocated.

safetensors checks every shape against the file's size, so shapes read here are never larger.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from cache.errors import PatchcacheError
from cache.files.atomic import path_in_errors
from cache.files.foreign import reading_foreign_file

MAX_HEADER_BYTES = 25_000_000
"""Twice the header of a model of 100,000 tensors."""


@dataclass(frozen=True)
class TensorFile:
    """The header of a safetensors file."""

    tensors: dict[str, tuple[str, tuple[int, ...]]]
    """Dtype, as safetensors spells it, and shape of each tensor, by name."""
    metadata: dict[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, by name."""
        return {name: shape for name, (_, shape) in self.tensors.items()}


def read_header(
    path: Path, refuse: Callable[[str], PatchcacheError], max_bytes: int = MAX_HEADER_BYTES
) -> TensorFile:
    """Read names, dtypes, shapes and metadata of a safetensors file.

    Args:
        path: The file.
        refuse: Makes the error from a one-line description of the fault.
        max_bytes: Most bytes of the header.

    Raises:
        PatchcacheError: The error that `refuse` returned: no such file, no safetensors file, or a
            header that is too large.
        OSError: The system could not read the file.
    """
    if not path.is_file():
        raise refuse("no such file")
    with path_in_errors(path), path.open("rb") as start:
        length = int.from_bytes(start.read(8), "little")
    if length > max_bytes:
        raise refuse(f"wanted a header of at most {max_bytes} bytes, found one of {length}")
    with reading_foreign_file(refuse, path), safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        tensors = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
        return TensorFile(tensors, file.metadata() or {})
