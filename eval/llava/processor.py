"""Builds the processor of an exported model: tokenizer, chat template, image processor."""

from pathlib import Path

from PIL import Image
from transformers import LlavaProcessor, PhiConfig, PreTrainedTokenizerBase

from cache.spec import Spec
from eval.llava.llava_phi import PatchcacheImageProcessor
from workspace.errors import StageError

IMAGE_TOKEN = "<image>"

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
"""Gives the text of Phi-2's format (`train.data.prompt_formats`), with all pictures before it."""


def image_token_id(tokenizer: PreTrainedTokenizerBase, config: PhiConfig) -> int:
    """Return the token id of the patches' placeholder: the first unused row of the embeddings.

    The patches replace the row's content, and the embeddings keep their size.

    Raises:
        StageError: Every row has a token.
    """
    token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        token_id = len(tokenizer)
    if not token_id < config.vocab_size:
        raise StageError(
            f"llm.model: the tokenizer uses all {config.vocab_size} rows of the embeddings, and "
            f"LLaVA needs one more for {IMAGE_TOKEN}. Use a checkpoint with unused rows."
        )
    return int(token_id)


def make_processor(
    tokenizer: PreTrainedTokenizerBase, spec: Spec, patch_size: int, *, answers: bool
) -> LlavaProcessor:
    """Build the processor, which makes the model's inputs from pictures and messages.

    Args:
        tokenizer: The language model's; it gets the image token, and left padding.
        spec: Spec of the features that the run was trained on.
        patch_size: Side of a patch in pixels.
        answers: Whether the model was trained on conversations. A model that only captions has no
            chat template: its prompt is the picture alone.
    """
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]})
    tokenizer.pad_token = tokenizer.eos_token
    # For batched generation. save_pretrained writes init_kwargs, not the attribute.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    return LlavaProcessor(
        image_processor=image_processor(spec),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE.read_text(encoding="utf-8") if answers else None,
        image_token=IMAGE_TOKEN,
        # The class token, which the strategy "default" drops.
        num_additional_image_tokens=1,
    )


def image_processor(spec: Spec) -> PatchcacheImageProcessor:
    """Build an image processor that gives the normalised pixels of `pipeline.images.decode`."""
    side = {"height": spec.image_size, "width": spec.image_size}
    is_squashed = spec.resize == "squash"
    return PatchcacheImageProcessor(
        size=side if is_squashed else {"shortest_edge": spec.image_size},
        do_center_crop=not is_squashed,
        crop_size=side,
        resample=Image.Resampling[spec.interpolation.upper()],
        image_mean=list(spec.mean),
        image_std=list(spec.std),
    )
