"""Reads the numbers of a transformers image processor, and checks that our decoding equals it.

Pixels are compared, not names: whatever a processor does beside resizing, cropping and normalising
shows in the pixels of a few drawn pictures.

Letters: S side of the tower's input in pixels.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoImageProcessor, BaseImageProcessor

from cache.errors import PatchcacheError
from cache.files.foreign import reading_foreign_file
from pipeline.images.decode import FILTERS, to_square
from pipeline.towers.hub import logging_disabled
from pipeline.towers.tower import Preprocess
from workspace.checkpoint_files import Refusal, holding_back_stderr
from workspace.json_files import read_json

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")

PICTURE_SIZES = ((640, 427), (427, 640), (30, 41))
"""Width and height of the compared pictures; most sides of towers leave odd numbers to cut off."""

TOLERANCES = {"pil": 1e-3, "torchvision": 1.0}
"""Largest difference of a pixel in gray levels, of 255, by the processor's backend. DINOv3's, the
one without Pillow, resizes in float32, without rounding to whole gray levels."""

MAX_SIDE = 4096
"""Largest side of a picture, in pixels: one of 20,000 takes minutes and 9 GiB."""

BEYOND = "it does more than resize, crop and normalise"


def read_preprocess(folder: Path, refusal: Refusal) -> Preprocess:
    """Return what a model's image processor does.

    Args:
        folder: The folder of the model.
        refusal: Makes the errors.

    Raises:
        PatchcacheError: From `refusal`: no processor, or another one than `decode_rgb` can be.
    """
    found = [name for name in PROCESSOR_FILES if (folder / name).is_file()]
    refuse = refusal((found or PROCESSOR_FILES)[0])
    for name in found or PROCESSOR_FILES:
        read_json(folder / name, refusal(name))
    with reading_foreign_file(refuse), logging_disabled(), holding_back_stderr(for_good=True):
        # Pillow, because it is what decodes here.
        processor = AutoImageProcessor.from_pretrained(
            folder, backend="pil", trust_remote_code=False, local_files_only=True
        )

    def refuse_processor(detail: str) -> PatchcacheError:
        return refuse(f"{type(processor).__name__}: {detail}")

    with reading_foreign_file(refuse_processor), logging_disabled():
        preprocess = _numbers(processor)
        _check_pixels(processor, preprocess)
    return preprocess


def _numbers(processor: BaseImageProcessor) -> Preprocess:
    """Translate a processor's attributes.

    Raises:
        ValueError: Says what the decoder cannot do.
    """
    if not processor.do_resize or processor.size is None:
        raise ValueError("it does not resize pictures to one size")
    mode, side = _resizing(processor)
    if side > MAX_SIDE:
        raise ValueError(f"it resizes to {side} pixels, wanted at most {MAX_SIDE}")
    size = side
    if processor.do_center_crop:
        size = _side(processor.crop_size, "it crops to")
        if size > side:
            raise ValueError(f"it resizes to {side} pixels and pads to {size}")
    elif mode == "shortest":
        raise ValueError("it keeps the shape of pictures, wanted squares")
    filters = [key for key, value in FILTERS.items() if value == processor.resample]
    if not filters:
        raise ValueError(f"resample is {processor.resample!r}, wanted one of {FILTERS}")
    # The encoder divides by 255 before it normalises.
    scale = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    mean = processor.image_mean if processor.do_normalize else (0.0,) * 3
    std = processor.image_std if processor.do_normalize else (1.0,) * 3
    if abs(scale - 1) > 1e-6:
        mean, std = ([value / scale for value in values] for values in (mean, std))
    return Preprocess(
        size=size,
        resize=mode if side == size else f"{mode}-{side}",
        crop="center" if (mode, size) == ("squash", side) else "center_floor",
        interpolation=filters[0],
        mean=tuple(mean),
        std=tuple(std),
    )


def _resizing(processor: BaseImageProcessor) -> tuple[str, int]:
    """Return how a processor resizes, and to what side."""
    shortest, longest = processor.size.shortest_edge, processor.size.longest_edge
    if shortest and not longest:
        return "shortest", int(shortest)
    return "squash", _side(processor.size, "it resizes to")


def _side(size: Any, what: str) -> int:
    if not size or not size.height or size.height != size.width:
        raise ValueError(f"{what} {size}, wanted a square")
    return int(size.height)


def _check_pixels(processor: BaseImageProcessor, preprocess: Preprocess) -> None:
    """Compare the processor's pixels with ours, on pictures of noise.

    Raises:
        ValueError: They differ.
    """
    tolerance = TOLERANCES[processor.backend]
    rng = np.random.default_rng(0)
    for width, height in PICTURE_SIZES:
        noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        picture = Image.fromarray(noise)
        ours = np.array(to_square(picture, *preprocess.geometry)).astype(np.float32)
        theirs = _gray_levels(processor, picture, preprocess)
        if ours.shape != theirs.shape:
            raise ValueError(f"{BEYOND}: its pixels have the shape {theirs.shape}")
        difference = float(np.abs(ours - theirs).max())
        # Not `>`, which is False for NaN.
        if not difference <= tolerance:
            raise ValueError(
                f"{BEYOND}: pixels of a picture of {width} x {height} differ by "
                f"{difference:.3g} of 255"
            )


def _gray_levels(
    processor: BaseImageProcessor, picture: Image.Image, preprocess: Preprocess
) -> NDArray[np.float64]:
    """Return a processor's pixels as they were before the normalisation: [S, S, 3], 0 to 255."""
    output = processor(images=[picture], return_tensors="pt")["pixel_values"][0]
    pixels = np.moveaxis(output.numpy().astype(np.float64), 0, -1)
    levels: NDArray[np.float64] = (pixels * preprocess.std + preprocess.mean) * 255
    return levels
