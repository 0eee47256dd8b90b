"""The projector: maps patches of width D to embeddings of the language model's width H.

Its parameters are float32, whatever the language model's dtype. With a pool, it first averages
squares of patches, so that an image takes fewer positions of the language model. The pool belongs
to the weights and stands in their file: whoever loads a projector pools as it learned.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from cache.errors import SettingsError
from cache.files.atomic import replacing
from cache.files.foreign import reading_foreign_file, writing_foreign_file
from workspace.errors import StageError
from workspace.tensor_file import read_header

MAX_HEADER_BYTES = 10_000
"""Far more than any projector's header."""

POOLS = (1, 2, 4)
"""Sides of the squares of patches that are averaged."""


class Residual(nn.Module):
    """Pre-norm residual block: x + MLP(norm(x)), width kept."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., H] to [..., H]."""
        residual: Tensor = self.down(nn.functional.gelu(self.up(self.norm(x))))
        return x + residual


class Projector(nn.Module):
    """Maps patches [..., D] to embeddings [..., H].

    linear    one linear layer
    mlp       linear, GELU, linear: LLaVA-1.5's projector, layer for layer
    resblock  linear, then a pre-norm residual block

    With a pool of more than 1, the layers get the mean of each square of pool x pool patches.
    """

    def __init__(self, kind: str, vision_width: int, text_width: int, pool: int = 1) -> None:
        super().__init__()
        self.kind, self.vision_width, self.text_width = kind, vision_width, text_width
        self.pool = pool
        layers: list[nn.Module] = [nn.Linear(vision_width, text_width)]
        if kind == "mlp":
            layers += [nn.GELU(), nn.Linear(text_width, text_width)]
        elif kind == "resblock":
            layers += [Residual(text_width)]
        elif kind != "linear":
            raise ValueError(f"no kind of projector: {kind!r}")
        self.layers = nn.Sequential(*layers)

    def forward(self, patches: Tensor) -> Tensor:
        """Map [..., P, D] of any float dtype to [..., P / pool^2, H]."""
        dtype = next(self.parameters()).dtype
        if self.pool > 1:
            patches = mean_of_squares(patches, self.pool, dtype)
        embeds: Tensor = self.layers(patches.to(dtype))
        return embeds

    def num_embeddings(self, num_patches: int) -> int:
        """Return how many embeddings an image of so many patches gets."""
        return num_patches // self.pool**2

    def save(self, path: Path) -> None:
        """Write a safetensors file atomically, with kind, widths and pool in its metadata."""
        about = {
            "kind": self.kind,
            "vision_width": self.vision_width,
            "text_width": self.text_width,
        }
        if self.pool > 1:
            # Without a pool, the bytes are those of a version that had none.
            about["pool"] = self.pool
        # One entry: safetensors writes several in random order.
        metadata = {"projector": json.dumps(about)}
        with replacing(path) as temporary, writing_foreign_file(path):
            save_model(self, str(temporary), metadata)


def mean_of_squares(patches: Tensor, pool: int, dtype: torch.dtype) -> Tensor:
    """Average each square of pool x pool patches of a square grid.

    Args:
        patches: [..., P, D], the rows of the grid one after the other.
        pool: Divides the side of the grid.
        dtype: Of the sums and the result.

    Returns:
        [..., P / pool^2, D], again row by row.
    """
    *images, num_patches, width = patches.shape
    side = math.isqrt(num_patches) // pool
    squares = patches.reshape(*images, side, pool, side, pool, width)
    means: Tensor = squares.mean((-4, -2), dtype=dtype)
    return means.reshape(*images, side * side, width)


def check_pool(pool: int, num_patches: int, where: str) -> None:
    """Refuse a pool that does not cut the grid of patches into squares.

    Args:
        pool: Side of the squares.
        num_patches: Of an image.
        where: Settings key or file that asks for the pool, for the error text.

    Raises:
        SettingsError: The grid is not square, or its side is no multiple of the pool.
    """
    if pool == 1:
        return
    side = math.isqrt(num_patches)
    if side**2 != num_patches:
        raise SettingsError(
            f"{where}: pool is {pool}, which needs a square grid of patches; the features have "
            f"{num_patches} patches an image, which are no square. Set projector.pool to 1."
        )
    if side % pool:
        fitting = " or ".join(str(number) for number in POOLS if side % number == 0)
        raise SettingsError(
            f"{where}: pool is {pool}, the features have {num_patches} patches an image, a grid of "
            f"{side} x {side}, and {side} is no multiple of {pool}. Set projector.pool to "
            f"{fitting}."
        )


def load_projector(path: Path, vision_width: int, text_width: int) -> Projector:
    """Read a projector and check its two widths.

    Raises:
        StageError: No such file, no projector, or other widths.
    """
    projector = read_projector(path)
    found = (projector.vision_width, projector.text_width)
    if found != (vision_width, text_width):
        raise StageError(
            f"{path}: maps width {found[0]} to {found[1]}, wanted {vision_width} (features) "
            f"to {text_width} (language model). Run the stage that made it again."
        )
    return projector


def read_projector(path: Path) -> Projector:
    """Read a projector of any widths.

    Raises:
        StageError: No such file, or no projector.
        OSError: The system could not read the file.
    """

    def refuse(detail: str) -> StageError:
        return StageError(f"{path}: no projector ({detail}). Run the stage that makes it.")

    header = read_header(path, refuse, MAX_HEADER_BYTES)
    with reading_foreign_file(refuse, path):
        about = json.loads(header.metadata["projector"])
        shape = about["kind"], about["vision_width"], about["text_width"]
        pool = about.get("pool", 1)
        if type(pool) is not int or pool not in POOLS:
            raise ValueError(f"its header says pool {pool!r}")
        with torch.device("meta"):
            wanted = {name: tuple(t.shape) for name, t in Projector(*shape).state_dict().items()}
        if header.tensors != {name: ("F32", shape) for name, shape in wanted.items()}:
            raise ValueError(
                f"its header says {shape[0]} of width {shape[1]} to {shape[2]}, its tensors "
                f"are {header.tensors}"
            )
        # Only now: the claimed widths decide how much memory this takes.
        projector = Projector(*shape, pool)
        load_model(projector, path)
    return projector


def seeded_projector(
    kind: str, vision_width: int, text_width: int, seed: int, pool: int = 1
) -> Projector:
    """Return a fresh projector whose weights depend only on the arguments, not on the pool."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Projector(kind, vision_width, text_width, pool)
