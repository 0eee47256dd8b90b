"""Draws a scene: a noisy background, then each thing as a smooth, outlined, slightly rotated shape.

A thing is drawn at several times its size and scaled down, which makes its edges smooth. All random
choices come from the scene's `texture`.
"""

import functools
import random

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from demo.scenes import Kind, Place, Scene
from demo.shapes import FIXED_TONES, SHAPES, Part

Rgb = tuple[int, int, int]

COLOUR_VALUES: dict[str, Rgb] = {
    "red": (216, 40, 40),
    "yellow": (248, 212, 48),
    "green": (30, 150, 70),
    "blue": (40, 90, 220),
    "purple": (128, 60, 176),
    "pink": (250, 150, 195),
    "white": (248, 248, 244),
    "black": (34, 34, 38),
}
BACKGROUND_VALUES: dict[str, Rgb] = {
    "grass": (150, 178, 104),
    "sand": (222, 198, 152),
    "snow": (222, 232, 242),
    "water": (104, 168, 196),
    "night sky": (78, 84, 150),
    "bricks": (172, 106, 84),
}
OUTLINE: Rgb = (18, 18, 24)
"""The same for all things, so that a shape looks alike in every colour."""

SHORT_SIDE = 112
"""The shorter side of a picture, in pixels."""

_LONG_SIDES = (112, 120, 128)
_TILE = 256
_OUTLINE_WIDTH = 2
_SHARPNESS = 4
"""Factor by which a thing is drawn larger than it appears."""


def draw_scene(scene: Scene) -> Image.Image:
    """Return the RGB picture of a scene: tall, wide or square, all things in the middle square."""
    rng = random.Random(scene.texture)
    width, height = picture_size(scene)
    picture = _background(scene.background, width, height, rng)
    for kind in scene.kinds:
        tint = _jitter(COLOUR_VALUES[kind.colour], rng, 12)
        for place in kind.places:
            sprite = _sprite(kind, place, tint)
            left, top = square_origin(scene)
            corner = (
                round(left + place.x * SHORT_SIDE - sprite.width / 2),
                round(top + place.y * SHORT_SIDE - sprite.height / 2),
            )
            picture.paste(sprite, corner, sprite)
    return picture


def picture_size(scene: Scene) -> tuple[int, int]:
    """Return width and height in pixels; a third of the pictures are square."""
    rng = random.Random(scene.texture + 1)
    sides = [SHORT_SIDE, rng.choice(_LONG_SIDES)]
    rng.shuffle(sides)
    return sides[0], sides[1]


def square_origin(scene: Scene) -> tuple[int, int]:
    """Return the left and top pixel of the middle square."""
    width, height = picture_size(scene)
    return (width - SHORT_SIDE) // 2, (height - SHORT_SIDE) // 2


def _jitter(colour: Rgb, rng: random.Random, amount: int) -> Rgb:
    red, green, blue = (min(255, max(0, c + rng.randint(-amount, amount))) for c in colour)
    return red, green, blue


def _background(name: str, width: int, height: int, rng: random.Random) -> Image.Image:
    """Cut a random window out of the background's tile, and add a gradient of light."""
    tile = _tile(name)
    top, left = rng.randrange(_TILE - height), rng.randrange(_TILE - width)
    window = tile[top : top + height, left : left + width]
    light = np.linspace(rng.uniform(-14, 14), rng.uniform(-14, 14), height, dtype=np.float32)
    return Image.fromarray((window + light[:, None, None]).clip(0, 255).astype(np.uint8))


@functools.cache
def _tile(name: str) -> npt.NDArray[np.float32]:
    """Return the tile of a background, [256, 256, 3]; it is always the same."""
    noise = np.random.default_rng(list(BACKGROUND_VALUES).index(name))
    grain = noise.normal(0, 1, (_TILE, _TILE)).astype(np.float32)
    rows, columns = np.mgrid[0:_TILE, 0:_TILE].astype(np.float32)
    if name == "grass":
        pattern = 6 * (grain + np.roll(grain, 1, 0) + np.roll(grain, 2, 0))
    elif name == "sand":
        pattern = 5 * grain + 4 * np.sin((rows + 4 * np.sin(columns / 17)) / 4)
    elif name == "snow":
        pattern = 3 * grain - 10 * (_smooth(grain, 6) > 1)
    elif name == "water":
        pattern = 3 * grain + 8 * np.sin((rows + 3 * np.sin(columns / 6)) / 2.6)
    elif name == "night sky":
        pattern = 3 * grain + 120 * (grain > 2.8)
    else:
        shifted = columns + 10 * ((rows // 10) % 2)
        pattern = 4 * grain + 20 * ((rows % 10 < 2) | (shifted % 20 < 2))
    return np.asarray(BACKGROUND_VALUES[name], np.float32) + pattern[:, :, None].astype(np.float32)


def _smooth(grain: npt.NDArray[np.float32], reach: int) -> npt.NDArray[np.float32]:
    """Return low-pass noise of unit variance."""
    total = sum(np.roll(grain, (i, j), (0, 1)) for i in range(reach) for j in range(reach))
    return np.asarray(total / reach, np.float32)


def _sprite(kind: Kind, place: Place, tint: Rgb) -> Image.Image:
    """Draw a thing on a transparent square slightly larger than its own."""
    side = round(place.side * SHORT_SIDE) * _SHARPNESS
    margin = (_OUTLINE_WIDTH + 1) * _SHARPNESS
    canvas = Image.new("RGBA", (side + 2 * margin,) * 2, (*OUTLINE, 0))
    pen = ImageDraw.Draw(canvas)
    for part in SHAPES[kind.noun]:
        _fill(pen, part, side, margin, OUTLINE, grow=_OUTLINE_WIDTH * _SHARPNESS)
    for part in SHAPES[kind.noun]:
        _fill(pen, part, side, margin, _tone(part, tint), grow=0)
    return canvas.rotate(place.turn, Image.Resampling.BILINEAR).reduce(_SHARPNESS)


def _fill(
    pen: ImageDraw.ImageDraw, part: Part, side: int, margin: int, colour: Rgb, grow: int
) -> None:
    """Fill a part, widened on all sides by `grow` pixels of the enlarged canvas."""
    points = [(margin + x * side, margin + y * side) for x, y in part.points]
    if part.round:
        (left, top), (right, bottom) = points
        pen.ellipse((left - grow, top - grow, right + grow, bottom + grow), fill=colour)
        return
    pen.polygon(points, fill=colour)
    if grow:
        pen.line([*points, points[0], points[1]], fill=colour, width=2 * grow, joint="curve")


def _tone(part: Part, tint: Rgb) -> Rgb:
    if part.tone == "main":
        return tint
    return _shade(tint) if part.tone == "shade" else FIXED_TONES[part.tone]


def _shade(colour: Rgb) -> Rgb:
    """Return a darker shade of a colour; black gets lighter instead."""
    factor, lift = (0.8, 0) if sum(colour) > 150 else (1.0, 28)
    red, green, blue = (min(255, int(channel * factor) + lift) for channel in colour)
    return red, green, blue
