"""Words for the facts of a scene: numbers, plurals, places and backgrounds."""

from demo.scenes import Kind, Place

NUMBERS = ("zero", "one", "two", "three", "four", "five")
COLUMNS = ("on the left", "in the middle", "on the right")
ROWS = ("at the top", "in the middle", "at the bottom")

CORNERS = (
    ("in the top left corner", "at the top", "in the top right corner"),
    ("on the left", "in the centre", "on the right"),
    ("in the bottom left corner", "at the bottom", "in the bottom right corner"),
)
"""Place phrases by row and column."""

SETTINGS = {
    "grass": ("on the grass", "on a lawn", "in a meadow"),
    "sand": ("on the sand", "on a sandy beach", "in a desert"),
    "snow": ("in the snow", "on a snowy field", "in deep snow"),
    "water": ("on the water", "on a lake", "out at sea"),
    "night sky": ("in the night sky", "in a dark sky", "at night"),
    "bricks": ("in front of a brick wall", "in front of bricks", "against a wall of bricks"),
}
"""Phrases for the setting of a picture, by background."""

_PLURALS = {"box": "boxes", "fish": "fish"}


def plural(noun: str) -> str:
    """Return the plural of a noun."""
    return _PLURALS.get(noun, noun + "s")


def noun_of(kind: Kind) -> str:
    """Return the noun of a kind, in singular or plural."""
    return kind.noun if kind.count == 1 else plural(kind.noun)


def article(word: str) -> str:
    """Return the indefinite article of a word."""
    return "an" if word[0] in "aeiou" else "a"


def quantity(kind: Kind, description: str) -> str:
    """Put the number of things, or an article, before their description."""
    if kind.count == 1:
        return f"{article(description)} {description}"
    return f"{NUMBERS[kind.count]} {description}"


def corner(place: Place) -> str:
    """Return the phrase for a place."""
    return CORNERS[place.row][place.column]


def listing(parts: list[str]) -> str:
    """Join phrases with commas and a last "and"."""
    if len(parts) == 1:
        return parts[0]
    return ", ".join(parts[:-1]) + " and " + parts[-1]


def sentence(text: str) -> str:
    """Give a phrase a capital letter and a full stop."""
    return text[0].upper() + text[1:] + "."
