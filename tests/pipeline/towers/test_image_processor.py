"""Our decoding gives the pixels of a processor of transformers, or refuses it by name."""

import io

import numpy as np
import pytest
import transformers
from PIL import Image

from cache.errors import SettingsError
from pipeline.images.decode import decode_rgb
from pipeline.towers.image_processor import read_preprocess

SIZES = [(64, 48), (48, 64), (33, 47), (61, 40), (31, 90), (7, 5), (200, 200), (640, 427)]


def of_side(side):
    return {"height": side, "width": side}


SHORTEST = {"size": {"shortest_edge": 33}}

CROP = {"crop_size": of_side(32)}

PROCESSORS = {
    "clip": ("CLIPImageProcessorPil", {"size": {"shortest_edge": 32}} | CROP),
    "clip-odd": ("CLIPImageProcessorPil", SHORTEST | {"crop_size": of_side(33)}),
    "dinov2": ("BitImageProcessorPil", {"size": {"shortest_edge": 37}} | CROP),
    "siglip": ("SiglipImageProcessorPil", {"size": of_side(32)}),
    "siglip-bilinear": ("SiglipImageProcessorPil", {"size": of_side(32), "resample": 2}),
    "squash-and-crop": (
        "CLIPImageProcessorPil",
        {"size": of_side(37), "crop_size": of_side(32)},
    ),
    "vit": ("ViTImageProcessorPil", {"size": of_side(32)}),
    "other-scale": ("SiglipImageProcessorPil", {"size": of_side(32), "rescale_factor": 1 / 127.5}),
    "not-scaled": ("SiglipImageProcessorPil", {"size": of_side(32), "do_rescale": False}),
    "not-normalised": ("SiglipImageProcessorPil", {"size": of_side(32), "do_normalize": False}),
}
"""transformers' name of a processor, and its numbers."""

DINOV3 = ("DINOv3ViTImageProcessor", {"size": of_side(32)})


@pytest.fixture
def saved(tmp_path):
    """Writes a processor into a folder; returns the folder and the processor."""

    def save(name, numbers):
        processor = getattr(transformers, name)(**numbers)
        processor.save_pretrained(tmp_path)
        return tmp_path, processor

    return save


def refusal(file):
    return lambda detail: SettingsError(f"{file}: {detail}")


def drawn(size):
    width, height = size
    pixels = np.random.default_rng(size).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def ours(image, preprocess):
    """The normalised pixels that the encoder gives to a tower."""
    pixels = decode_rgb(png(image), *preprocess.geometry).astype(np.float32) / 255
    normalised = (pixels - np.float32(preprocess.mean)) / np.float32(preprocess.std)
    return np.moveaxis(normalised, -1, 0)


def theirs(image, processor):
    return processor(images=[image], return_tensors="pt")["pixel_values"][0].numpy()


@pytest.mark.parametrize("kind", PROCESSORS)
def test_pixels_are_those_of_the_processor(saved, kind):
    folder, processor = saved(*PROCESSORS[kind])
    preprocess = read_preprocess(folder, refusal)
    for size in SIZES:
        found, wanted = ours(drawn(size), preprocess), theirs(drawn(size), processor)
        assert found.shape == wanted.shape, size
        # Less than a hundredth of a gray level.
        limit = 0.01 / 255 / np.min(preprocess.std)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=limit, err_msg=str(size))


def test_pixels_of_dinov3_are_those_of_its_processor_to_one_gray_level(saved):
    """Its processor resizes in float32, so its values lie between whole gray levels."""
    folder, processor = saved(*DINOV3)
    preprocess = read_preprocess(folder, refusal)
    assert preprocess.geometry == (32, "squash", "bilinear", "center")
    std = np.array(preprocess.std).reshape(3, 1, 1)
    for size in SIZES:
        difference = (ours(drawn(size), preprocess) - theirs(drawn(size), processor)) * std * 255
        assert np.abs(difference).max() <= 1 + 1e-3, size
        assert np.abs(difference).mean() < 0.4, size


def test_the_numbers_of_a_processor_that_scales_by_255_are_kept_to_the_last_bit(saved):
    folder, processor = saved(*PROCESSORS["dinov2"])
    preprocess = read_preprocess(folder, refusal)
    assert preprocess.mean == tuple(processor.image_mean)
    assert preprocess.std == tuple(processor.image_std)


@pytest.mark.parametrize(
    ("name", "numbers", "why"),
    [
        ("CLIPImageProcessorPil", {"do_resize": False}, "does not resize"),
        ("CLIPImageProcessorPil", {"do_center_crop": False}, "keeps the shape"),
        ("CLIPImageProcessorPil", {"size": {"shortest_edge": 30}} | CROP, "pads to 32"),
        ("CLIPImageProcessorPil", {"crop_size": {"height": 32, "width": 48}}, "wanted a square"),
        ("SiglipImageProcessorPil", {"size": {"height": 32, "width": 48}}, "wanted a square"),
        (
            "BitImageProcessorPil",
            {"size": {"shortest_edge": 40, "longest_edge": 60}} | CROP,
            "wanted a square",
        ),
        ("SiglipImageProcessorPil", {"resample": 0}, "resample"),
        ("CLIPImageProcessorPil", {"size": {"shortest_edge": 5000}} | CROP, "5000 pixels, wanted"),
        ("SiglipImageProcessorPil", {"size": {"height": 5000, "width": 5000}}, "at most 4096"),
        ("ConvNextImageProcessorPil", {"size": {"shortest_edge": 224}}, ""),
        ("Siglip2ImageProcessorPil", {}, "does not resize"),
        ("ViTImageProcessorPil", {"size": of_side(32), "image_mean": [0.5, 0.5]}, "3 elements"),
    ],
    ids=str,
)
def test_a_processor_that_cannot_be_reproduced_is_refused_by_name(saved, name, numbers, why):
    folder, _ = saved(name, numbers)
    with pytest.raises(SettingsError, match=r"^preprocessor_config.json: ") as caught:
        read_preprocess(folder, refusal)
    assert f": {name}: " in str(caught.value)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_processor_that_does_something_more_is_found_by_its_pixels(saved, monkeypatch):
    folder, _ = saved(*PROCESSORS["clip"])
    usual = transformers.CLIPImageProcessorPil.resize
    monkeypatch.setattr(
        transformers.CLIPImageProcessorPil,
        "resize",
        lambda self, image, **options: usual(self, image, **options)[:, :, ::-1],
    )
    with pytest.raises(SettingsError, match=r"ProcessorPil: it does more .*640 x 427 differ"):
        read_preprocess(folder, refusal)


def test_without_a_processor_there_are_no_numbers(tmp_path):
    with pytest.raises(SettingsError, match=r"^preprocessor_config.json: no such file"):
        read_preprocess(tmp_path, refusal)


def test_a_processor_inside_processor_config_is_read(saved):
    folder, _ = saved(*PROCESSORS["siglip"])
    alone = read_preprocess(folder, refusal)
    inner = (folder / "preprocessor_config.json").read_text()
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(f'{{"image_processor": {inner}}}')
    assert read_preprocess(folder, refusal) == alone
