"""Builds the processor of an exported model: tokenizer, chat template, image processor."""

import copy

from PIL import Image
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerBase

from cache.spec import Spec
from eval.llava.llava_phi import PatchcacheImageProcessor, UprightImageProcessor
from eval.llava.vision import VisionPart
from train.data.prompts import PromptFormat
from workspace.errors import StageError

IMAGE_TOKEN = "<image>"


def with_image_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a copy of a tokenizer that has the image token.

    A new token takes the id that is the number of all others. Most checkpoints have rows of the
    embeddings there that no token uses.

    Raises:
        StageError: Another token has this id, since lower ones are unused.
    """
    longer = copy.deepcopy(tokenizer)
    longer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]})
    token_id = longer.convert_tokens_to_ids(IMAGE_TOKEN)
    others = {token for token, other in tokenizer.get_vocab().items() if other == token_id}
    if others - {IMAGE_TOKEN}:
        raise StageError(
            f"llm.model: the tokenizer of {tokenizer.name_or_path} leaves out ids, so that a new "
            f"token {IMAGE_TOKEN} would have the id {token_id} of {others.pop()!r}. Give its "
            f"tokens the ids from 0 on without gaps, train again, and export that run."
        )
    return longer


def make_processor(
    tokenizer: PreTrainedTokenizerBase,
    vision: VisionPart,
    spec: Spec,
    chat_template: str | None,
    *,
    own_code: bool,
) -> LlavaProcessor:
    """Build the processor, which makes the model's inputs from pictures and messages.

    Args:
        tokenizer: The language model's, with the image token; it gets left padding.
        vision: The vision tower.
        spec: Spec of the features that the run was trained on.
        chat_template: In Jinja; None for a model that only captions, whose prompt is the picture.
        own_code: Whether the model is exported with code of ours.
    """
    tokenizer.pad_token = tokenizer.eos_token
    # For batched generation. save_pretrained writes init_kwargs, not the attribute.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    return LlavaProcessor(
        image_processor=image_processor(spec, own_code=own_code),
        tokenizer=tokenizer,
        patch_size=vision.config.patch_size,
        vision_feature_select_strategy=vision.strategy,
        chat_template=chat_template,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=vision.num_prefix_tokens,
    )


def prompts_differ(processor: LlavaProcessor, prompt_format: PromptFormat) -> bool:
    """Return whether a question has other tokens in the exported format than in training.

    Some tokenizers mark the text behind every special token as the start of a word, behind the
    image token too; in training no token stands there.
    """
    if processor.chat_template is None:
        return False
    question = "What is in the box?"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}])
    found: list[int] = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt = prompt_format.dialogue_prompt([], question)
    return found != [*prompt_format.lead, processor.image_token_id, *prompt]


def image_processor(spec: Spec, *, own_code: bool) -> UprightImageProcessor | CLIPImageProcessor:
    """Build an image processor that gives the normalised pixels of `pipeline.images.decode`.

    Args:
        spec: Spec of the features.
        own_code: Whether it may be of our own class. Transformers' own does not turn pictures by
            their EXIF orientation, and crops a pixel beside open_clip's crop where half of an odd
            margin is rounded up; its default backend resizes some values to the next of 256 levels.
    """
    mode, _, number = spec.resize.partition("-")
    side = int(number or spec.image_size)
    crop = {"height": spec.image_size, "width": spec.image_size}
    kind: type[UprightImageProcessor | CLIPImageProcessor] = CLIPImageProcessor
    if own_code:
        is_floor = spec.crop == "center_floor"
        kind = UprightImageProcessor if is_floor else PatchcacheImageProcessor
    return kind(
        size={"height": side, "width": side} if mode == "squash" else {"shortest_edge": side},
        do_center_crop=mode != "squash" or side != spec.image_size,
        crop_size=crop,
        resample=Image.Resampling[spec.interpolation.upper()],
        image_mean=list(spec.mean),
        image_std=list(spec.std),
    )
