"""Makes the processor of an exported model: its tokenizer, its chat format, its pixels."""

from pathlib import Path

from PIL import Image
from transformers import LlavaProcessor, PhiConfig, PreTrainedTokenizerBase

from cache.spec import Spec
from eval.llava.llava_phi import PatchcacheImageProcessor
from workspace.errors import StageError

IMAGE_TOKEN = "<image>"

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
"""Writes a conversation as `train.data.prompts.dialogue_prompt` does, pictures before all text."""


def image_token_id(tokenizer: PreTrainedTokenizerBase, config: PhiConfig) -> int:
    """Return the first row of the embeddings that no token uses: the placeholder of patches.

    Its content never matters, and the embeddings keep their size.

    Raises:
        StageError: There is none.
    """
    token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        token_id = len(tokenizer)
    if not token_id < config.vocab_size:
        raise StageError(
            f"llm.model: its tokenizer uses all {config.vocab_size} rows of the embeddings, and "
            f"LLaVA needs one more for {IMAGE_TOKEN}. Take a checkpoint with rows to spare."
        )
    return int(token_id)


def make_processor(
    tokenizer: PreTrainedTokenizerBase, spec: Spec, patch_size: int, *, answers: bool
) -> LlavaProcessor:
    """Make what turns pictures and messages into the inputs that the model learned from.

    Args:
        tokenizer: Of the language model; gets the image's token and pads on the left.
        spec: Of the features.
        patch_size: Side of a patch in pixels.
        answers: Whether the model was trained on conversations; one that only captions gets no
            chat format, since nothing stands behind the picture.
    """
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]})
    tokenizer.pad_token = tokenizer.eos_token
    # Answers grow on the right; as an attribute alone it would not be saved.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    return LlavaProcessor(
        image_processor=image_processor(spec),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE.read_text(encoding="utf-8") if answers else None,
        image_token=IMAGE_TOKEN,
        # The class token, which "default" takes off again.
        num_additional_image_tokens=1,
    )


def image_processor(spec: Spec) -> PatchcacheImageProcessor:
    """Make the processor: pixels of `pipeline.images.decode`, scaled as the tower wants them."""
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
