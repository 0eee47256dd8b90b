"""Writes scenes down in full, for training the checkpoints: as prose, inventories and rasters.

A raster lists the cells of the grid in reading order, like the patches of a vision tower, with a
few words for the content of each. All words of a cell can share one position of the language
model, which prepares it for the outputs of a projector.
"""

import random

from demo.scenes import GRID, NOUNS, Scene
from demo.words import NUMBERS, listing, noun_of, plural, quantity, sentence

Cells = list[list[str]]

ROW_WORDS = ("top", "middle", "bottom")
COLUMN_WORDS = ("left", "middle", "right")
GROUNDS = {"night sky": "night"}
"""Words for backgrounds whose name is not a single word."""


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
    """Return nouns, each with all its facts, or with "none" if the scene lacks it."""
    absent = [noun for noun in NOUNS if noun not in {kind.noun for kind in scene.kinds}]
    lines = [(noun, "none") for noun in rng.sample(absent, 3)]
    for kind in scene.kinds:
        words = [kind.colour, kind.size, NUMBERS[kind.count]]
        if kind.count == 1:
            words += [ROW_WORDS[kind.places[0].row], COLUMN_WORDS[kind.places[0].column]]
        lines.append((kind.noun, " ".join(words)))
    rng.shuffle(lines)
    return lines


def raster(scene: Scene, rng: random.Random, share: float, seen_only: bool) -> Cells:
    """Return the words of each cell of the grid, row by row from the top left.

    Args:
        scene: The scene.
        rng: Chooses the facts of each cell and their order.
        share: Probability of each fact of a cell; a cell has at least one.
        seen_only: Leave out facts that a patch of this cell cannot show: its position, and how
            many things of its kind the scene has.
    """
    cells = []
    for row in range(GRID):
        for column in range(GRID):
            words = _words_at(scene, row, column)
            if not seen_only:
                words += [ROW_WORDS[row], COLUMN_WORDS[column]]
                words += [NUMBERS[kind.count] for kind in scene.kinds if kind.noun in words]
            rng.shuffle(words)
            chosen = [word for word in words if rng.random() < share]
            cells.append(chosen or words[:1])
    return cells


def _words_at(scene: Scene, row: int, column: int) -> list[str]:
    """Return the words for a cell: those of its thing, or of the background."""
    for kind in scene.kinds:
        if (row, column) in [(place.row, place.column) for place in kind.places]:
            return [kind.noun, kind.colour, kind.size]
    return [GROUNDS.get(scene.background, scene.background)]


def _cell_words(row: int, column: int) -> str:
    if row == column == 1:
        return "middle"
    return f"{ROW_WORDS[row]} {COLUMN_WORDS[column]}"
