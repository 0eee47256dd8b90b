"""How the world's facts are put into words: numbers, plurals, places and backgrounds."""

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
"""Ways to say where a picture was taken, by background."""

_PLURALS = {"box": "boxes", "fish": "fish"}


def plural(noun: str) -> str:
    """Return the word for several of a noun."""
    return _PLURALS.get(noun, noun + "s")


def noun_of(kind: Kind) -> str:
    """Return a kind's noun in the number that fits it."""
    return kind.noun if kind.count == 1 else plural(kind.noun)


def article(word: str) -> str:
    """Return the indefinite article that goes before a word."""
    return "an" if word[0] in "aeiou" else "a"


def quantity(kind: Kind, description: str) -> str:
    """Put the number of a kind's things, or an article, before their description."""
    if kind.count == 1:
        return f"{article(description)} {description}"
    return f"{NUMBERS[kind.count]} {description}"


def corner(place: Place) -> str:
    """Return where a place is, in one phrase."""
    return CORNERS[place.row][place.column]


def listing(parts: list[str]) -> str:
    """Join phrases as a sentence does: with commas and a last "and"."""
    if len(parts) == 1:
        return parts[0]
    return ", ".join(parts[:-1]) + " and " + parts[-1]


def sentence(text: str) -> str:
    """Give a phrase a capital letter and a full stop."""
    return text[0].upper() + text[1:] + "."
