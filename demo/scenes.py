"""The scenes of the world: which things a picture shows, where, and in which colours.

A scene is a background and one to three kinds of things; a kind is a noun in one colour and one
size, in one to three cells of a 3 x 3 grid. The picture, the captions and the answers all follow
from the scene. Lengths and positions are shares of the picture's shorter side, from the top left.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

NOUNS = ("ball", "box", "star", "tree", "house", "car", "boat", "flower", "fish", "heart")
COLOURS = ("red", "yellow", "green", "blue", "purple", "pink", "white", "black")
BACKGROUNDS = ("grass", "sand", "snow", "water", "night sky", "bricks")
GRID = 3
"""Rows and columns of the cells in which things stand."""

SIZES = {"small": 0.2, "large": 0.3}
"""Mean side of a thing's square, by the word for its size."""

_KINDS_WEIGHTS = (0.25, 0.45, 0.30)
_COUNT_WEIGHTS = (0.55, 0.25, 0.20)
_MOST_THINGS = 5
_MOST_SHIFT = 0.02
"""Greatest distance of a thing from the middle of its cell, along each axis."""

_RIM = 0.02
"""Free margin along each edge."""

CELL_SIDE = (1 - 2 * _RIM) / GRID


@dataclass(frozen=True, kw_only=True)
class Place:
    """The cell of a thing in the grid, and its exact square."""

    row: int
    column: int
    x: float
    """Centre, from the left."""
    y: float
    """Centre, from the top."""
    side: float
    turn: float
    """Degrees counter-clockwise."""

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the square."""
        half = self.side / 2
        return self.x - half, self.y - half, self.x + half, self.y + half


@dataclass(frozen=True, kw_only=True)
class Kind:
    """All things of one noun in a scene, which share a colour and a size."""

    noun: str
    colour: str
    size: str
    places: tuple[Place, ...]

    @property
    def count(self) -> int:
        """Number of these things."""
        return len(self.places)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The content of a picture; `texture` seeds all details that no text mentions."""

    background: str
    kinds: tuple[Kind, ...]
    texture: int

    @property
    def num_things(self) -> int:
        """Number of things of all kinds."""
        return sum(kind.count for kind in self.kinds)


def scene_at(seed: int, part: str, index: int) -> Scene:
    """Return a scene of an endless list, as a pure function of the arguments.

    Args:
        seed: The world's seed.
        part: Name of the list, such as "train2017"; every list has other scenes.
        index: Position in the list, from 0.
    """
    return sample_scene(random.Random(f"{seed}/{part}/{index}"))


def sample_scene(rng: random.Random) -> Scene:
    """Return a random scene: distinct nouns, distinct cells, colours that may repeat."""
    counts = _sample_counts(rng)
    nouns = rng.sample(NOUNS, len(counts))
    cells = rng.sample(
        [(row, column) for row in range(GRID) for column in range(GRID)], sum(counts)
    )
    kinds = []
    for noun, count in zip(nouns, counts, strict=True):
        size = rng.choice(list(SIZES))
        own_cells, cells = sorted(cells[:count]), cells[count:]
        places = tuple(_sample_place(rng, cell, size) for cell in own_cells)
        kinds.append(Kind(noun=noun, colour=rng.choice(COLOURS), size=size, places=places))
    background = rng.choice(BACKGROUNDS)
    return Scene(background=background, kinds=tuple(kinds), texture=rng.getrandbits(32))


def _sample_counts(rng: random.Random) -> Sequence[int]:
    num_kinds = rng.choices((1, 2, 3), _KINDS_WEIGHTS)[0]
    counts = rng.choices((1, 2, 3), _COUNT_WEIGHTS, k=num_kinds)
    while sum(counts) > _MOST_THINGS:
        counts[counts.index(max(counts))] -= 1
    return counts


def _sample_place(rng: random.Random, cell: tuple[int, int], size: str) -> Place:
    row, column = cell
    side = SIZES[size] * rng.uniform(0.92, 1.08)
    # Within its cell, so that no thing covers another.
    slack = min(_MOST_SHIFT, max(0.0, (CELL_SIDE - side) / 2))
    return Place(
        row=row,
        column=column,
        x=_RIM + (column + 0.5) * CELL_SIDE + rng.uniform(-slack, slack),
        y=_RIM + (row + 0.5) * CELL_SIDE + rng.uniform(-slack, slack),
        side=side,
        turn=rng.uniform(-6, 6),
    )
