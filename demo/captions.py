"""Writes captions in five styles, each of which mentions other facts."""

import random
from collections.abc import Callable

from demo.scenes import Kind, Scene
from demo.words import SETTINGS, corner, listing, noun_of, quantity, sentence

Style = Callable[[Scene, random.Random], str]


def captions(scene: Scene, rng: random.Random) -> list[str]:
    """Return five different captions of a scene, in the order of `STYLES`."""
    texts: list[str] = []
    for style in STYLES:
        text = style(scene, rng)
        while text in texts:
            text = style(scene, rng)
        texts.append(text)
    return texts


def caption(scene: Scene, rng: random.Random) -> str:
    """Return one caption in a random style."""
    return rng.choice(STYLES)(scene, rng)


def _plain(scene: Scene, rng: random.Random) -> str:
    """Counts and colours, then the setting."""
    things = listing([quantity(kind, _coloured(kind)) for kind in _shuffled(scene, rng)])
    return sentence(f"{things} {_setting(scene, rng)}")


def _setting_first(scene: Scene, rng: random.Random) -> str:
    """The setting, then counts and colours."""
    setting = _setting(scene, rng)
    things = listing([quantity(kind, _coloured(kind)) for kind in _shuffled(scene, rng)])
    verb = rng.choice(("there is", "we see", "you can see"))
    if verb == "there is" and _shown_count(things) > 1:
        verb = "there are"
    return sentence(f"{setting} {verb} {things}")


def _sized(scene: Scene, rng: random.Random) -> str:
    """Sizes and colours; no setting."""
    things = [quantity(kind, f"{kind.size} {_coloured(kind)}") for kind in _shuffled(scene, rng)]
    opening = rng.choice(("a picture of", "an image of", "a drawing of"))
    return sentence(f"{opening} {listing(things)}")


def _placed(scene: Scene, rng: random.Random) -> str:
    """Counts and colours, and the places of single things."""
    things = []
    for kind in _shuffled(scene, rng):
        phrase = quantity(kind, _coloured(kind))
        things.append(f"{phrase} {corner(kind.places[0])}" if kind.count == 1 else phrase)
    return sentence(rng.choice(("", "this shows ", "here is ")) + listing(things))


def _brief(scene: Scene, rng: random.Random) -> str:
    """Nouns and the setting; half of the captions name colours."""
    with_colour = rng.random() < 0.5
    things = []
    for kind in _shuffled(scene, rng):
        description = _coloured(kind) if with_colour else noun_of(kind)
        things.append(quantity(kind, description) if kind.count == 1 else f"some {description}")
    return sentence(f"{listing(things)} seen {_setting(scene, rng)}")


STYLES: tuple[Style, ...] = (_plain, _setting_first, _sized, _placed, _brief)


def _shuffled(scene: Scene, rng: random.Random) -> list[Kind]:
    return rng.sample(scene.kinds, len(scene.kinds))


def _coloured(kind: Kind) -> str:
    return f"{kind.colour} {noun_of(kind)}"


def _setting(scene: Scene, rng: random.Random) -> str:
    return rng.choice(SETTINGS[scene.background])


def _shown_count(things: str) -> int:
    """Return 1 for a phrase that starts with an article, so that its verb is singular."""
    return 1 if things.split()[0] in ("a", "an") else 2
