"""Asks questions about a scene that its picture alone can answer, with their answers.

Each asker returns a question and its answer, or None if the scene does not determine the answer:
colours are asked by noun, which is unique, and nouns by colour only if the colour is unique.
"""

import random
from collections.abc import Callable

from demo.captions import caption
from demo.scenes import COLOURS, NOUNS, Kind, Scene
from demo.words import COLUMNS, NUMBERS, ROWS, article, noun_of, plural

CAPTION_REQUEST = "Provide a one-sentence caption for the provided image."

Turn = tuple[str, str]
Asker = Callable[[Scene, random.Random], Turn | None]


def ask(scene: Scene, rng: random.Random, num_turns: int) -> list[Turn]:
    """Return distinct questions with their answers, drawn with the weights of `ASKERS`."""
    turns: dict[str, str] = {}
    while len(turns) < num_turns:
        asker = rng.choices(list(ASKERS), list(ASKERS.values()))[0]
        turn = asker(scene, rng)
        if turn is not None:
            turns.setdefault(*turn)
    return list(turns.items())


def _colour(scene: Scene, rng: random.Random) -> Turn:
    kind = rng.choice(scene.kinds)
    verb = "is" if kind.count == 1 else "are"
    return f"What color {verb} the {noun_of(kind)}?", kind.colour


def _count(scene: Scene, rng: random.Random) -> Turn:
    """Choose the number first, so that all numbers are equally likely."""
    by_count: dict[int, list[Kind]] = {}
    for kind in scene.kinds:
        by_count.setdefault(kind.count, []).append(kind)
    count = rng.choice(sorted(by_count))
    noun = plural(rng.choice(by_count[count]).noun)
    form = rng.choice(("How many {} are there?", "How many {} can you see?"))
    return form.format(noun), NUMBERS[count]


def _total(scene: Scene, rng: random.Random) -> Turn:
    return "How many things are there in total?", NUMBERS[scene.num_things]


def _presence(scene: Scene, rng: random.Random) -> Turn:
    """Ask for a noun that the scene has in half of the cases."""
    shown = [kind.noun for kind in scene.kinds]
    if rng.random() < 0.5:
        noun, answer = rng.choice(shown), "yes"
    else:
        noun, answer = rng.choice([noun for noun in NOUNS if noun not in shown]), "no"
    return f"Is there {article(noun)} {noun} in the picture?", answer


def _coloured_presence(scene: Scene, rng: random.Random) -> Turn:
    """Ask for a noun in its own colour in half of the cases, else in another colour."""
    kind = rng.choice(scene.kinds)
    colour, answer = kind.colour, "yes"
    if rng.random() < 0.5:
        colour, answer = rng.choice([other for other in COLOURS if other != kind.colour]), "no"
    return f"Is there {article(colour)} {colour} {kind.noun}?", answer


def _column(scene: Scene, rng: random.Random) -> Turn | None:
    single = _singles(scene)
    if not single:
        return None
    kind = rng.choice(single)
    question = f"Is the {kind.noun} on the left, in the middle or on the right?"
    return question, COLUMNS[kind.places[0].column]


def _row(scene: Scene, rng: random.Random) -> Turn | None:
    single = _singles(scene)
    if not single:
        return None
    kind = rng.choice(single)
    question = f"Is the {kind.noun} at the top, in the middle or at the bottom?"
    return question, ROWS[kind.places[0].row]


def _size(scene: Scene, rng: random.Random) -> Turn:
    kind = rng.choice(scene.kinds)
    verb = "Is" if kind.count == 1 else "Are"
    return f"{verb} the {noun_of(kind)} small or large?", kind.size


def _background(scene: Scene, rng: random.Random) -> Turn:
    question = rng.choice(("What is in the background?", "What is behind the things?"))
    return question, scene.background


def _noun(scene: Scene, rng: random.Random) -> Turn | None:
    colours = [kind.colour for kind in scene.kinds]
    unique = [kind for kind in scene.kinds if colours.count(kind.colour) == 1]
    if not unique:
        return None
    kind = rng.choice(unique)
    if kind.count == 1:
        return f"What is the {kind.colour} thing?", f"{article(kind.noun)} {kind.noun}"
    return f"What are the {kind.colour} things?", plural(kind.noun)


def _caption(scene: Scene, rng: random.Random) -> Turn:
    return CAPTION_REQUEST, caption(scene, rng)


ASKERS: dict[Asker, float] = {
    _colour: 4,
    _count: 2.5,
    _total: 0.5,
    _presence: 1.5,
    _coloured_presence: 1,
    _column: 1.5,
    _row: 1.5,
    _size: 1,
    _background: 1.5,
    _noun: 2.5,
    _caption: 3,
}
"""Relative frequency of each asker."""


def _singles(scene: Scene) -> list[Kind]:
    return [kind for kind in scene.kinds if kind.count == 1]
