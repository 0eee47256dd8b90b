"""Says what a safetensors file holds, before anything as large as it claims to be is allocated.

safetensors itself holds every tensor's shape against the bytes that are there, so shapes read here
are never larger than the file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from cache.errors import PatchcacheError
from cache.files.atomic import path_in_errors
from cache.files.foreign import reading_foreign_file

MAX_HEADER_BYTES = 25_000_000
"""A model of 100,000 tensors has half of it."""


@dataclass(frozen=True)
class TensorFile:
    """The header of a safetensors file."""

    tensors: dict[str, tuple[str, tuple[int, ...]]]
    """The type, as safetensors spells it, and the shape of each tensor, by name."""
    metadata: dict[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, by name."""
        return {name: shape for name, (_, shape) in self.tensors.items()}


def read_header(
    path: Path, refuse: Callable[[str], PatchcacheError], max_bytes: int = MAX_HEADER_BYTES
) -> TensorFile:
    """Read names, types, shapes and metadata of a safetensors file.

    Args:
        path: The file.
        refuse: Makes the error out of one line that says what is wrong.
        max_bytes: The largest header that such a file has.

    Raises:
        PatchcacheError: What `refuse` returned: no such file, none of safetensors, or a header
            that is too large.
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
