"""Builds the processor of an exported model: tokenizer, chat template, image processor."""

import copy
from pathlib import Path

from PIL import Image
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerBase

from cache.spec import Spec
from eval.llava.llava_phi import PatchcacheImageProcessor

IMAGE_TOKEN = "<image>"

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
"""Gives the text of `train.data.prompts.dialogue_prompt`, with all pictures before it."""


def with_image_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a copy of a tokenizer that has the image token.

    A new token takes the first id behind all others. Most checkpoints have rows of the embeddings
    there that no token uses.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]})
    return tokenizer


def make_processor(
    tokenizer: PreTrainedTokenizerBase,
    spec: Spec,
    patch_size: int,
    *,
    answers: bool,
    own_code: bool,
) -> LlavaProcessor:
    """Build the processor, which makes the model's inputs from pictures and messages.

    Args:
        tokenizer: The language model's, with the image token; it gets left padding.
        spec: Spec of the features that the run was trained on.
        patch_size: Side of a patch in pixels.
        answers: Whether the model was trained on conversations. A model that only captions has no
            chat template: its prompt is the picture alone.
        own_code: Whether the model is exported with code of ours.
    """
    tokenizer.pad_token = tokenizer.eos_token
    # For batched generation. save_pretrained writes init_kwargs, not the attribute.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    return LlavaProcessor(
        image_processor=image_processor(spec, own_code=own_code),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE.read_text(encoding="utf-8") if answers else None,
        image_token=IMAGE_TOKEN,
        # The class token, which the strategy "default" drops.
        num_additional_image_tokens=1,
    )


def image_processor(spec: Spec, *, own_code: bool) -> PatchcacheImageProcessor | CLIPImageProcessor:
    """Build an image processor that gives the normalised pixels of `pipeline.images.decode`.

    Args:
        spec: Spec of the features.
        own_code: Whether it may be of our own class. Transformers' own does not turn pictures by
            their EXIF orientation, and crops a pixel away where half of an odd margin is rounded
            up; its default backend resizes some pixels to the next of 256 levels.
    """
    side = {"height": spec.image_size, "width": spec.image_size}
    is_squashed = spec.resize == "squash"
    kind = PatchcacheImageProcessor if own_code else CLIPImageProcessor
    return kind(
        size=side if is_squashed else {"shortest_edge": spec.image_size},
        do_center_crop=not is_squashed,
        crop_size=side,
        resample=Image.Resampling[spec.interpolation.upper()],
        image_mean=list(spec.mean),
        image_std=list(spec.std),
    )
