"""Scenes written down in full, for the checkpoints' training: prose, inventories, rasters.

A raster goes over the picture's cells in reading order, as a vision tower's patches do, and has
some words for each: what is seen there. Several words share one position when they are read as
one; the language model meets that again in a projector's outputs.
"""

import random

from demo.scenes import GRID, Kind, Scene
from demo.words import NUMBERS, listing, noun_of, plural, quantity, sentence

Cells = list[list[str]]

ROW_WORDS = ("top", "middle", "bottom")
COLUMN_WORDS = ("left", "middle", "right")
GROUNDS = {"night sky": "night"}
"""The word for a background where it is not its name."""


def notes(scene: Scene, rng: random.Random) -> str:
    """Return every fact of a scene in one shuffled sentence."""
    parts = []
    for kind in rng.sample(scene.kinds, len(scene.kinds)):
        places = listing([_cell_words(place.row, place.column) for place in kind.places])
        description = f"{kind.size} {kind.colour} {noun_of(kind)}"
        parts.append(f"{quantity(kind, description)} {places}")
    parts.insert(rng.choice((0, len(parts))), scene.background)
    return sentence(", ".join(parts))


def inventory(scene: Scene, rng: random.Random) -> str:
    """Return every fact of a scene as lines of a list in shuffled order."""
    lines = [f"background: {scene.background}"]
    for kind in scene.kinds:
        lines += [
            f"{kind.size} {kind.colour} {kind.noun}: {_cell_words(place.row, place.column)}"
            for place in kind.places
        ]
        lines.append(f"{plural(kind.noun)}: {NUMBERS[kind.count]}")
    rng.shuffle(lines)
    return "\n".join(lines) + "\n"


def raster(scene: Scene, rng: random.Random, side: int, most_words: int) -> Cells:
    """Return what is seen in each cell of a grid laid over a scene, in reading order.

    Args:
        scene: What to look at.
        rng: Chooses which facts a cell tells; each is told by some cells only.
        side: Cells in a row, and rows.
        most_words: Each cell holds from one to so many words.
    """
    cells = []
    for row in range(side):
        for column in range(side):
            x, y = (column + 0.5) / side, (row + 0.5) / side
            facts = _facts_at(scene, x, y, reach=0.35 / side)
            num_words = min(len(facts), rng.randint(1, most_words))
            cells.append(rng.sample(facts, num_words))
    return cells


def _facts_at(scene: Scene, x: float, y: float, reach: float) -> list[str]:
    """Return the words for a point: its thing's facts, or its ground and where it lies."""
    near = [
        (max(abs(x - place.x), abs(y - place.y)) - place.side / 2, kind, place)
        for kind in scene.kinds
        for place in kind.places
    ]
    distance, kind, place = min(near, key=lambda thing: thing[0])
    if distance < reach:
        return [*_kind_words(kind), ROW_WORDS[place.row], COLUMN_WORDS[place.column]]
    row, column = int(y * GRID), int(x * GRID)
    ground = GROUNDS.get(scene.background, scene.background)
    return [ground, ground, ROW_WORDS[row], COLUMN_WORDS[column]]


def _kind_words(kind: Kind) -> list[str]:
    # What it is and its colour matter most, so they are told twice as often.
    return [kind.noun, kind.noun, kind.colour, kind.colour, kind.size, NUMBERS[kind.count]]


def _cell_words(row: int, column: int) -> str:
    if row == column == 1:
        return "middle"
    return f"{ROW_WORDS[row]} {COLUMN_WORDS[column]}"
