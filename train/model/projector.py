"""The projector: maps patches of width D to embeddings of the language model's width H.

Its parameters are float32, whatever the language model's dtype.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from cache.files.atomic import replacing
from cache.files.foreign import reading_foreign_file, writing_foreign_file
from workspace.errors import StageError
from workspace.tensor_file import read_header

MAX_HEADER_BYTES = 10_000
"""Far more than any projector's header."""


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
    """

    def __init__(self, kind: str, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.kind, self.vision_width, self.text_width = kind, vision_width, text_width
        layers: list[nn.Module] = [nn.Linear(vision_width, text_width)]
        if kind == "mlp":
            layers += [nn.GELU(), nn.Linear(text_width, text_width)]
        elif kind == "resblock":
            layers += [Residual(text_width)]
        elif kind != "linear":
            raise ValueError(f"no kind of projector: {kind!r}")
        self.layers = nn.Sequential(*layers)

    def forward(self, patches: Tensor) -> Tensor:
        """Map [..., P, D] to [..., P, H]."""
        embeds: Tensor = self.layers(patches)
        return embeds

    def save(self, path: Path) -> None:
        """Write a safetensors file atomically, with kind and widths in its metadata."""
        about = {
            "kind": self.kind,
            "vision_width": self.vision_width,
            "text_width": self.text_width,
        }
        # One entry: safetensors writes several in random order.
        metadata = {"projector": json.dumps(about)}
        with replacing(path) as temporary, writing_foreign_file(path):
            save_model(self, str(temporary), metadata)


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
        with torch.device("meta"):
            wanted = {name: tuple(t.shape) for name, t in Projector(*shape).state_dict().items()}
        if header.tensors != {name: ("F32", shape) for name, shape in wanted.items()}:
            raise ValueError(
                f"its header says {shape[0]} of width {shape[1]} to {shape[2]}, its tensors "
                f"are {header.tensors}"
            )
        # Only now: the claimed widths decide how much memory this takes.
        projector = Projector(*shape)
        load_model(projector, path)
    return projector


def seeded_projector(kind: str, vision_width: int, text_width: int, seed: int) -> Projector:
    """Return a fresh projector whose weights depend only on the arguments."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Projector(kind, vision_width, text_width)
