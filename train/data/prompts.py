"""What the language model reads behind the patches of an image, and which tokens it must learn.

A text is a list of segments; the learned ones are captions and answers, each followed by EOS, so
that the model learns to stop. Each segment is tokenised on its own: " answer" and "answer" are
different tokens, and this way training and generation cut the text at the same place.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Segment:
    """A piece of text that is tokenised on its own."""

    text: str
    learned: bool
    """Whether the loss counts its tokens, and an EOS follows it."""


Text = tuple[Segment, ...]
"""All that follows the patches in one branch: a caption, or a conversation."""


@dataclass(frozen=True)
class Branch:
    """A tokenised text; both lists have length T."""

    token_ids: list[int]
    learned: list[bool]
    cut: bool = False
    """Whether the text was longer."""

    @property
    def num_learned(self) -> int:
        """Number of supervised tokens."""
        return sum(self.learned)


def caption_text(caption: str) -> Text:
    """Stage 1: the caption stands straight behind the patches."""
    return (Segment(caption, True),)


def question_text(question: str) -> str:
    """Return Phi-2's own question-answer prompt, up to where the answer begins.

    Source: the model card of microsoft/phi-2, "QA Format".
    """
    return f"Instruct: {question}\nOutput:"


def conversation_text(turns: Sequence[tuple[str, str]]) -> Text:
    """Stage 2: every turn as prompt and answer, one behind the other.

    Args:
        turns: Question and answer of each turn.
    """
    segments: list[Segment] = []
    for question, answer in turns:
        segments += [Segment(question_text(question), False), Segment(f" {answer}", True)]
    return tuple(segments)


def dialogue_prompt(
    turns: Sequence[tuple[str, str]], question: str, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Return the tokens of what was said so far and of a new question, as training has them.

    Args:
        turns: Questions and answers so far.
        question: What is asked now.
        tokenizer: Of the language model; its EOS ends every answer.
    """
    said = tokenize([conversation_text(turns)], tokenizer, sys.maxsize)[0].token_ids
    return said + encode([question_text(question)], tokenizer)[0]


def tokenize(
    texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> list[Branch]:
    """Tokenise some texts.

    Args:
        texts: Any number of them.
        tokenizer: Of the language model; its EOS ends every learned segment.
        max_tokens: Longest branch. Turns that exceed it are left out; a first turn that does is
            cut, and then has no EOS.

    Returns:
        A branch a text.
    """
    encoded = iter(encode([segment.text for text in texts for segment in text], tokenizer))
    eos = tokenizer.eos_token_id
    return [_branch(text, [next(encoded) for _ in text], eos, max_tokens) for text in texts]


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokenise pieces of text as training and generation both do.

    A special token that is written out in a text is text: an EOS in a caption ends nothing.
    """
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)
    token_ids: list[list[int]] = encoded["input_ids"]
    return token_ids


def _branch(text: Text, pieces: list[list[int]], eos: int, max_tokens: int) -> Branch:
    token_ids: list[int] = []
    learned: list[bool] = []
    kept = 0
    for segment, piece in zip(text, pieces, strict=True):
        token_ids += piece + [eos] * segment.learned
        learned += [segment.learned] * (len(piece) + segment.learned)
        if segment.learned and len(token_ids) <= max_tokens:
            kept = len(token_ids)
    end = kept or max_tokens
    return Branch(token_ids[:end], learned[:end], cut=end < len(token_ids))
