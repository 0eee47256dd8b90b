"""The demo's tokenizer: byte-level BPE like Phi-2's, learned from the world's own text.

As with Phi-2, the last token of the vocabulary is BOS, EOS and unknown token alike, there is no
token for padding, and nothing is added to a text.
"""

import random
from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from demo.captions import captions
from demo.contexts import inventory, notes, raster
from demo.questions import ask
from demo.scenes import scene_at

END_OF_TEXT = "<|endoftext|>"
START_OF_TURN, END_OF_TURN = "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML, as many models have it."""

_NUM_SCENES = 3000
_MOST_TOKENS = 1024


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Learn the tokenizer from the text of some scenes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=_MOST_TOKENS - 1,
        min_frequency=20,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed), trainer)
    # Added last: CLIP's text tower takes the largest id for the end of the text.
    tokenizer.add_special_tokens([END_OF_TEXT])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def chat_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return a copy for a chat model, with tokens that begin and end a turn, and a template."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens([START_OF_TURN, END_OF_TURN])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TURN,
        unk_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _texts(seed: int) -> Iterator[str]:
    for index in range(_NUM_SCENES):
        rng = random.Random(f"{seed}/tokenizer/{index}")
        scene = scene_at(seed, "tokenizer", index)
        yield from captions(scene, rng)
        yield notes(scene, rng)
        yield inventory(scene, rng)
        yield "".join(
            " " + word for cell in raster(scene, rng, share=1.0, seen_only=False) for word in cell
        )
        for question, answer in ask(scene, rng, num_turns=4):
            yield prompt(question)
            yield f" {answer}"


def prompt(question: str) -> str:
    """Return a question in Phi-2's format; its answer follows after a space."""
    return f"Instruct: {question}\nOutput:"
