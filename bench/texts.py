"""Texts of the shape of COCO's captions and LLaVA's conversations, of words that mean nothing.

A benchmark of training needs how many texts an image has, how long they are and which of their
tokens are learned. Words are drawn at random from a vocabulary of Phi-2's size, one token each.

Lengths are those of real records, drawn again with replacement. Their tokens were counted with
open_clip's byte-pair tokenizer, which is of the same kind as Phi-2's and knows as many words:

    COCO 2017          530 captions of 106 images, five each: 11.7 tokens in the mean, 7 to 26
    LLaVA, several     16 conversations of 4 or 5 turns: 294 tokens in the mean, EOS of each turn
    questions          included, an answer 48
    LLaVA, reasoning   52 conversations of one turn: 149 tokens, 128 of them the answer
    LLaVA, detail      15 conversations of one turn: 150 tokens, 134 of them the answer
"""

from dataclasses import replace

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from train.data.examples import Example
from train.data.prompt_formats import phi_format
from train.data.prompts import PromptFormat, Slot, Turns, caption_turns

TOKENS, EOS_ID = 50_295, 50_256
"""Of Phi-2's tokenizer."""

CAPTIONS_AN_IMAGE = 5

CAPTION_LENGTHS = {
    7: 4, 8: 22, 9: 65, 10: 93, 11: 107, 12: 91, 13: 49, 14: 34, 15: 18,
    16: 14, 17: 12, 18: 6, 19: 1, 20: 6, 21: 2, 22: 4, 25: 1, 26: 1,
}  # fmt: skip
"""How many captions have so many tokens."""

Lengths = tuple[tuple[int, int], ...]
"""Tokens of question, prompt words included, and answer in each turn of a conversation."""

SEVERAL_QUESTIONS: tuple[Lengths, ...] = (
    ((16, 15), (19, 26), (18, 16), (23, 123)),
    ((17, 51), (14, 20), (16, 15), (13, 121)),
    ((17, 17), (16, 17), (13, 9), (21, 234)),
    ((14, 20), (13, 13), (14, 44), (14, 18), (14, 102)),
    ((14, 9), (13, 8), (15, 10), (18, 23), (23, 129)),
    ((14, 32), (13, 14), (18, 19), (15, 66)),
    ((15, 9), (17, 13), (16, 8), (14, 17), (14, 9)),
    ((17, 26), (15, 24), (16, 21), (25, 160)),
    ((18, 13), (20, 34), (24, 30), (23, 204)),
    ((17, 13), (17, 16), (15, 10), (21, 228)),
    ((15, 9), (16, 15), (16, 17), (13, 45), (17, 133)),
    ((14, 31), (16, 11), (15, 11), (14, 26), (18, 55)),
    ((16, 15), (19, 16), (13, 21), (14, 329)),
    ((14, 18), (14, 19), (15, 26), (20, 43), (19, 220)),
    ((15, 36), (13, 7), (20, 17), (16, 12), (13, 18)),
    ((15, 18), (16, 22), (15, 24), (19, 19), (18, 223)),
)
REASONING = (
    (22, 124), (24, 168), (18, 132), (29, 112), (17, 125), (17, 133), (24, 147), (21, 184),
    (20, 133), (31, 133), (21, 323), (17, 107), (18, 144), (21, 93), (20, 104), (18, 103),
    (17, 132), (19, 89), (27, 145), (20, 58), (22, 111), (16, 123), (18, 150), (21, 105),
    (25, 83), (15, 133), (18, 160), (22, 120), (15, 75), (19, 89), (23, 126), (21, 120),
    (20, 74), (20, 77), (18, 171), (19, 177), (20, 143), (19, 117), (19, 86), (17, 100),
    (20, 151), (15, 106), (18, 136), (26, 128), (23, 87), (24, 170), (16, 74), (22, 283),
    (18, 132), (24, 95), (17, 128), (18, 119),
)  # fmt: skip
DETAIL = (
    (16, 125), (16, 173), (11, 191), (14, 141), (16, 125), (14, 115), (11, 115), (16, 155),
    (17, 119), (16, 121), (14, 107), (16, 160), (16, 124), (16, 111), (11, 127),
)  # fmt: skip

KINDS: tuple[tuple[float, tuple[Lengths, ...]], ...] = (
    (58 / 81.5, SEVERAL_QUESTIONS),
    (77 / 81.5, tuple((turn,) for turn in REASONING)),
    (23 / 81.5, tuple((turn,) for turn in DETAIL)),
)
"""Share of the images that have a conversation of each kind, and the lengths of such.

Source: the LLaVA paper (arXiv 2304.08485), section 3, counts 58, 77 and 23 thousand; they are about
81.5 thousand images, so 1.94 conversations an image. That an image has at most one of a kind,
independent of the others, is assumed; it gives 1.96.
"""


def make_tokenizer(tokens: int = TOKENS, eos_id: int = EOS_ID) -> PreTrainedTokenizerBase:
    """Return a fast tokenizer of as many tokens as Phi-2's: the word `w7` is token 7."""
    words = {f"w{token_id}": token_id for token_id in range(tokens)}
    del words[f"w{eos_id}"]
    words["<|endoftext|>"] = eos_id
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def bare_format(tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
    """Return a prompt format that adds nothing but EOS: lengths include the words of prompts."""
    bare = Slot()
    return replace(phi_format(tokenizer), first_question=bare, later_question=bare, answer=bare)


def draw_captions(rng: np.random.Generator, num_images: int, eos_id: int = EOS_ID) -> list[Example]:
    """Return the images 0 to num_images - 1 with captions, of words below the EOS."""
    lengths = np.repeat(list(CAPTION_LENGTHS), list(CAPTION_LENGTHS.values()))
    return [
        Example(
            image_id,
            tuple(
                caption_turns(_words(rng, length, eos_id))
                for length in rng.choice(lengths, CAPTIONS_AN_IMAGE).tolist()
            ),
        )
        for image_id in range(num_images)
    ]


def draw_conversations(
    rng: np.random.Generator, num_images: int, eos_id: int = EOS_ID
) -> list[Example]:
    """Return the images 0 to num_images - 1 with conversations, of words below the EOS."""
    examples: list[Example] = []
    while len(examples) < num_images:
        texts = tuple(
            _conversation(rng, lengths[rng.integers(len(lengths))], eos_id)
            for share, lengths in KINDS
            if rng.random() < share
        )
        if texts:
            examples.append(Example(len(examples), texts))
    return examples


def _conversation(rng: np.random.Generator, lengths: Lengths, eos_id: int) -> Turns:
    return tuple(
        (_words(rng, question, eos_id), _words(rng, answer, eos_id)) for question, answer in lengths
    )


def _words(rng: np.random.Generator, length: int, eos_id: int) -> str:
    # All ids below EOS, so that no text ends early.
    return " ".join(f"w{token_id}" for token_id in rng.integers(0, eos_id, length))
