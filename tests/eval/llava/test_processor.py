"""The exported processor gives the pixels and token ids of extraction and training."""

import copy
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from tokenizers import Tokenizer
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
)

from cache import Spec
from eval.llava.processor import (
    IMAGE_TOKEN,
    image_processor,
    make_processor,
    prompts_differ,
    with_image_token,
)
from eval.llava.vision import VisionPart
from pipeline.images.decode import decode_for
from tests.conftest import EOS
from train.data.jinja_template import jinja_template
from train.data.prompt_formats import phi_format, plain_format
from workspace.errors import StageError

SPEC = {
    "format": "patchcache/1", "model": "tiny", "weights_sha256": "0" * 64,
    "activation": "quick_gelu", "layer": -2, "tokens": "patch", "normalized": False,
    "image_size": 32, "resize": "shortest", "crop": "center", "interpolation": "bicubic",
    "mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28), "precision": "fp32", "batch_size": 4,
    "dtype": "float16", "patches": 16, "width": 8, "preprocess_version": 1,
}  # fmt: skip
SIZES = [(48, 40), (40, 48), (49, 32), (32, 51), (47, 33), (500, 21), (32, 32), (9, 7), (64, 43)]


VISION = VisionPart(CLIPVisionConfig(image_size=32, patch_size=8), {}, num_prefix_tokens=1)


def spec(**changes):
    return Spec(**{**SPEC, **changes})


def picture(size, mode="RGB"):
    rng = np.random.default_rng(sum(size))
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC).convert(mode)


def png(image, **options):
    data = io.BytesIO()
    image.save(data, "PNG", **options)
    return data.getvalue()


def pixels_of(data, **changes):
    """The tower's input in extraction: float32 [C, S, S]."""
    settings = spec(**changes)
    pixels = decode_for(data, settings)
    x = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (settings.mean, settings.std))
    return (x - mean) / std


def processed(processor, image):
    return processor(images=image, return_tensors="pt")["pixel_values"][0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"resize": "squash"},
        {"interpolation": "bilinear"},
        {"image_size": 31},
        {"resize": "shortest-37", "crop": "center_floor"},
        {"resize": "squash-37", "crop": "center_floor"},
    ],
    ids=str,
)
def test_pixels_are_those_of_extraction(size, changes):
    image = picture(size)
    found = processed(image_processor(spec(**changes), own_code=True), image)
    # A step of 8 bits is 0.014 at least.
    assert torch.allclose(found, pixels_of(png(image), **changes), atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1"])
def test_other_kinds_of_pictures_give_the_pixels_of_extraction(mode):
    image = picture((48, 40), mode)
    if mode.endswith("A"):
        image.putalpha(picture((48, 40), "L"))
    data = png(image)
    found = processed(image_processor(spec(), own_code=True), Image.open(io.BytesIO(data)))
    assert torch.allclose(found, pixels_of(data), atol=1e-6)


def test_gray_of_16_bits_is_not_scaled_as_the_model_card_says():
    gray = np.random.default_rng(0).integers(0, 2**16, (48, 40), dtype=np.uint16)
    data = png(Image.fromarray(gray))
    found = processed(image_processor(spec(), own_code=True), Image.open(io.BytesIO(data)))
    white = processed(image_processor(spec(), own_code=True), Image.new("RGB", (40, 48), "white"))
    assert (found - white).abs().mean() < 0.1 < (pixels_of(data) - white).abs().mean()


def test_a_picture_on_its_side_is_turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = png(picture((48, 40)), exif=exif)
    found = processed(image_processor(spec(), own_code=True), Image.open(io.BytesIO(data)))
    assert torch.allclose(found, pixels_of(data), atol=1e-6)


def plain(tmp_path, backend="pil", **changes):
    """Load the processor of an export without code of ours, as the model card does."""
    image_processor(spec(**changes), own_code=False).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    return AutoImageProcessor.from_pretrained(tmp_path, backend=backend)


def levels(found, wanted):
    """Return the differences of pixels in steps of 8 bits."""
    return (found - wanted).abs() * torch.tensor(SPEC["std"]).view(3, 1, 1) * 255


@pytest.mark.parametrize("resize", ["shortest", "squash"])
@pytest.mark.parametrize("size", SIZES)
def test_plain_pixels_are_those_of_extraction_but_for_half_of_an_odd_margin(tmp_path, size, resize):
    image = picture(size)
    changes = {"resize": resize}
    found = processed(plain(tmp_path, **changes), image)
    longest = int(32 * max(size) / min(size))
    is_cropped_elsewhere = resize == "shortest" and (longest - 32) % 4 == 3
    differs = levels(found, pixels_of(png(image), **changes)) > 0.01
    # Almost every pixel, since the whole picture is shifted.
    assert differs.float().mean() > 0.9 if is_cropped_elsewhere else not differs.any()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resize", ["shortest", "shortest-37", "squash-37"])
def test_plain_pixels_are_those_of_a_tower_of_transformers(tmp_path, size, resize):
    image, changes = picture(size), {"resize": resize, "crop": "center_floor"}
    found = processed(plain(tmp_path, **changes), image)
    assert levels(found, pixels_of(png(image), **changes)).max() < 0.01


def test_the_sizes_hold_both_kinds_of_odd_margins():
    margins = [int(32 * max(size) / min(size)) - 32 for size in SIZES]
    assert {margin % 4 for margin in margins} == {0, 1, 2, 3}


@pytest.mark.parametrize("size", [(48, 40), (32, 32), (500, 21)])
def test_torchvision_gives_a_few_pixels_the_next_levels(tmp_path, size):
    image = picture(size)
    found = processed(plain(tmp_path, backend="torchvision"), image)
    differences = levels(found, pixels_of(png(image)))
    assert differences.max() < 2.01
    assert (differences > 0.01).float().mean() < 0.02


def test_plain_classes_leave_a_picture_on_its_side(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = png(picture((48, 40)), exif=exif)
    processor = plain(tmp_path)
    found = processed(processor, Image.open(io.BytesIO(data)))
    assert levels(found, pixels_of(data)).max() > 10
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert levels(processed(processor, turned), pixels_of(data)).max() < 0.01


@pytest.fixture
def processor(phi_dir):
    tokenizer = AutoTokenizer.from_pretrained(phi_dir)
    template = jinja_template(phi_format(tokenizer), IMAGE_TOKEN)
    return make_processor(with_image_token(tokenizer), VISION, spec(), template, own_code=True)


CONVERSATIONS = [
    ([], "What is in the box"),
    ([("What is on the box", "a red cat")], "how many"),
    ([("a", "b"), ("what's this? ", "(none) "), ("x\ny", " two  spaces")], " how\nmany ?"),
]


@pytest.mark.parametrize(("turns", "question"), CONVERSATIONS)
@pytest.mark.parametrize("plain", [True, False])
def test_a_conversation_has_the_tokens_of_training(processor, tokenizer, turns, question, plain):
    texts = [text for turn in turns for text in turn] + [question]
    messages = [
        {"role": ("user", "assistant")[n % 2], "content": [{"type": "text", "text": text}]}
        for n, text in enumerate(texts)
    ]
    # Wherever a message has it, the picture stands before all text.
    messages[0]["content"].insert(1 - plain, {"type": "image"})
    for message in messages[1:] if plain else []:
        message["content"] = message["content"][0]["text"]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == processor.apply_chat_template(messages)
    inputs = processor(images=picture((40, 40)), text=text, return_tensors="pt")
    wanted = [processor.image_token_id] * 16 + phi_format(tokenizer).dialogue_prompt(
        turns, question
    )
    assert inputs["input_ids"][0].tolist() == wanted


def test_a_role_that_training_never_had_is_refused(processor):
    with pytest.raises(Exception, match="role user or assistant, found system"):
        processor.apply_chat_template([{"role": "system", "content": "be brief"}])


def test_the_processor_stays_the_same_when_saved(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.padding_side, loaded.pad_token) == ("left", EOS)
    assert loaded.convert_tokens_to_ids("<image>") == processor.image_token_id


def test_the_image_token_takes_the_first_id_behind_all_tokens(tokenizer):
    before = len(tokenizer)
    found = with_image_token(tokenizer).convert_tokens_to_ids(IMAGE_TOKEN)
    assert found == before == max(tokenizer.get_vocab().values()) + 1
    assert len(tokenizer) == before
    twice = with_image_token(with_image_token(tokenizer))
    assert twice.convert_tokens_to_ids(IMAGE_TOKEN) == found


def test_a_tokenizer_whose_next_id_is_taken_is_refused(tokenizer):
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    # As many unused ids as make a word's id that of the next token.
    state["model"]["vocab"] = {t: i if i < 280 else i + 20 for t, i in vocabulary.items()}
    gaps = copy.deepcopy(tokenizer)
    gaps._tokenizer = Tokenizer.from_str(json.dumps(state))
    word = gaps.convert_ids_to_tokens(len(gaps))
    assert word is not None
    with pytest.raises(StageError, match="leaves out ids") as caught:
        with_image_token(gaps)
    assert f"the id {len(gaps)} of {word!r}" in str(caught.value)


def test_prompts_that_differ_from_those_of_training_are_found(processor, tokenizer):
    assert not prompts_differ(processor, phi_format(tokenizer))
    assert prompts_differ(processor, plain_format(tokenizer))
    processor.chat_template = None
    assert not prompts_differ(processor, plain_format(tokenizer))
