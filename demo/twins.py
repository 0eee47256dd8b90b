"""Makes near twins: scenes that differ in one fact, so that CLIP must learn the details."""

import random
from collections.abc import Callable
from dataclasses import replace

from demo.scenes import BACKGROUNDS, CELL_SIDE, COLOURS, GRID, NOUNS, Kind, Scene

Change = Callable[[Scene, random.Random], Scene]


def near_twin(scene: Scene, rng: random.Random) -> Scene:
    """Return a scene that differs from the given one in one random fact."""
    changed = scene
    while changed == scene:
        changed = rng.choice(_CHANGES)(scene, rng)
    return replace(changed, texture=rng.getrandbits(32))


def _background(scene: Scene, rng: random.Random) -> Scene:
    return replace(scene, background=_other(BACKGROUNDS, {scene.background}, rng))


def _colour(scene: Scene, rng: random.Random) -> Scene:
    return _with(scene, rng, lambda kind: replace(kind, colour=_other(COLOURS, {kind.colour}, rng)))


def _noun(scene: Scene, rng: random.Random) -> Scene:
    taken = {kind.noun for kind in scene.kinds}
    return _with(scene, rng, lambda kind: replace(kind, noun=_other(NOUNS, taken, rng)))


def _count_or_place(scene: Scene, rng: random.Random) -> Scene:
    """Remove one of several things, or exchange the places of the kinds."""
    several = [kind for kind in scene.kinds if kind.count > 1]
    if several:
        chosen = rng.choice(several)
        gone = rng.randrange(chosen.count)
        places = chosen.places[:gone] + chosen.places[gone + 1 :]
        kinds = [replace(kind, places=places) if kind is chosen else kind for kind in scene.kinds]
        return replace(scene, kinds=tuple(kinds))
    places_of = [kind.places for kind in scene.kinds]
    turned = places_of[1:] + places_of[:1]
    pairs = zip(scene.kinds, turned, strict=True)
    return replace(scene, kinds=tuple(replace(kind, places=places) for kind, places in pairs))


def _place(scene: Scene, rng: random.Random) -> Scene:
    """Move a thing to a free cell."""
    taken = {(place.row, place.column) for kind in scene.kinds for place in kind.places}
    cells = [(row, column) for row in range(GRID) for column in range(GRID)]
    row, column = rng.choice([cell for cell in cells if cell not in taken])

    def move(kind: Kind) -> Kind:
        first, *rest = kind.places
        x = first.x + (column - first.column) * CELL_SIDE
        y = first.y + (row - first.row) * CELL_SIDE
        moved = replace(first, row=row, column=column, x=x, y=y)
        return replace(kind, places=(moved, *rest))

    return _with(scene, rng, move)


def _swap(scene: Scene, rng: random.Random) -> Scene:
    """Exchange the colours of two kinds, or change the colour of a single kind."""
    if len(scene.kinds) == 1:
        return _colour(scene, rng)
    first, second, *rest = rng.sample(scene.kinds, len(scene.kinds))
    pair = (replace(first, colour=second.colour), replace(second, colour=first.colour))
    return replace(scene, kinds=(*pair, *rest))


# Nouns are changed most often, because they are the hardest to see.
_CHANGES: tuple[Change, ...] = (
    *(_noun, _noun, _noun),
    _background,
    _colour,
    _count_or_place,
    _place,
    _swap,
)


def _with(scene: Scene, rng: random.Random, change: Callable[[Kind], Kind]) -> Scene:
    chosen = rng.randrange(len(scene.kinds))
    kinds = [change(kind) if i == chosen else kind for i, kind in enumerate(scene.kinds)]
    return replace(scene, kinds=tuple(kinds))


def _other(words: tuple[str, ...], taken: set[str], rng: random.Random) -> str:
    return rng.choice([word for word in words if word not in taken])
