"""Scenes written down in full, for the checkpoints' training: prose, inventories, rasters.

A raster goes over the picture's cells in reading order, as a vision tower's patches do, and has
some words for each: what is seen there. Several words share one position when they are read as
one; the language model meets that again in a projector's outputs.
"""

import random

from demo.scenes import GRID, NOUNS, Scene
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


def facts(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """Return nouns, each with all that is to be told about it, or "none" where it is not there."""
    absent = [noun for noun in NOUNS if noun not in {kind.noun for kind in scene.kinds}]
    told = [(rng.choice(absent), "none")]
    for kind in scene.kinds:
        words = [kind.colour, kind.size, NUMBERS[kind.count]]
        if kind.count == 1:
            words += [ROW_WORDS[kind.places[0].row], COLUMN_WORDS[kind.places[0].column]]
        told.append((kind.noun, " ".join(words)))
    rng.shuffle(told)
    return told


def raster(scene: Scene, rng: random.Random, side: int, share: float) -> Cells:
    """Return what is seen in each cell of a grid laid over a scene, in reading order.

    Args:
        scene: What to look at.
        rng: Chooses which facts a cell tells, and in which order.
        side: Cells in a row, and rows.
        share: How likely a cell tells each of its facts; it tells at least one.
    """
    cells = []
    for row in range(side):
        for column in range(side):
            x, y = (column + 0.5) / side, (row + 0.5) / side
            facts = _facts_at(scene, x, y, reach=0.35 / side)
            rng.shuffle(facts)
            told = [fact for fact in facts if rng.random() < share]
            cells.append(told or facts[:1])
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
        own = [kind.noun, kind.colour, kind.size, NUMBERS[kind.count]]
        return [*own, ROW_WORDS[place.row], COLUMN_WORDS[place.column]]
    row, column = int(y * GRID), int(x * GRID)
    ground = GROUNDS.get(scene.background, scene.background)
    return [ground, ROW_WORDS[row], COLUMN_WORDS[column]]


def _cell_words(row: int, column: int) -> str:
    if row == column == 1:
        return "middle"
    return f"{ROW_WORDS[row]} {COLUMN_WORDS[column]}"
