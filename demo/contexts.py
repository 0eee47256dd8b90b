"""Scenes written down in full, for the checkpoints' training: prose, inventories, rasters.

A raster goes over the places of the grid in reading order, as a vision tower's patches do, and
has some words for each: what is seen there. Several words share one position when they are read as
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
    told = [(noun, "none") for noun in rng.sample(absent, 3)]
    for kind in scene.kinds:
        words = [kind.colour, kind.size, NUMBERS[kind.count]]
        if kind.count == 1:
            words += [ROW_WORDS[kind.places[0].row], COLUMN_WORDS[kind.places[0].column]]
        told.append((kind.noun, " ".join(words)))
    rng.shuffle(told)
    return told


def raster(scene: Scene, rng: random.Random, share: float, seen_only: bool) -> Cells:
    """Return what is in each of the grid's places, row by row from the top left.

    Args:
        scene: What to look at.
        rng: Chooses which facts a cell tells, and in which order.
        share: How likely a cell tells each of its facts; it tells at least one.
        seen_only: Tell only what can be seen in that cell alone, as a patch would; where it lies
            and how many of its kind there are then follows from the other cells alone.
    """
    cells = []
    for row in range(GRID):
        for column in range(GRID):
            words = _words_at(scene, row, column)
            if not seen_only:
                words += [ROW_WORDS[row], COLUMN_WORDS[column]]
                words += [NUMBERS[kind.count] for kind in scene.kinds if kind.noun in words]
            rng.shuffle(words)
            told = [word for word in words if rng.random() < share]
            cells.append(told or words[:1])
    return cells


def _words_at(scene: Scene, row: int, column: int) -> list[str]:
    """Return the words for a cell: its thing's, or its ground's."""
    for kind in scene.kinds:
        if (row, column) in [(place.row, place.column) for place in kind.places]:
            return [kind.noun, kind.colour, kind.size]
    return [GROUNDS.get(scene.background, scene.background)]


def _cell_words(row: int, column: int) -> str:
    if row == column == 1:
        return "middle"
    return f"{ROW_WORDS[row]} {COLUMN_WORDS[column]}"
