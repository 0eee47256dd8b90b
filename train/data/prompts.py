"""Builds the token sequences behind the patches of an image, and their loss masks.

A text is a list of turns, each with a prompt and a target. Targets are captions or answers; an EOS
follows each of them, so that the model learns to stop. Prompts and targets are tokenised apart:
" answer" and "answer" are different tokens, and training must cut a text where generation does.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

Turns = tuple[tuple[str, str], ...]
"""Prompt and target of each turn of a text; a caption is one turn with an empty prompt."""


@dataclass(frozen=True)
class TokenizedText:
    """A tokenised text; both lists have length T."""

    token_ids: list[int]
    is_target: list[bool]
    """The loss mask: which tokens the loss counts."""
    was_cut: bool = False
    """Whether turns, or the end of the first turn, were left out."""

    @property
    def num_target_tokens(self) -> int:
        """Number of supervised tokens."""
        return sum(self.is_target)


def caption_turns(caption: str) -> Turns:
    """Return the turns of a caption: a single target, straight behind the patches."""
    return (("", caption),)


def question_text(question: str) -> str:
    """Return Phi-2's question-answer prompt, up to where the answer begins.

    Source: the model card of microsoft/phi-2, "QA Format".
    """
    return f"Instruct: {question}\nOutput:"


def conversation_turns(turns: Sequence[tuple[str, str]]) -> Turns:
    """Return the turns of a conversation: a prompt for each question, then its answer.

    Args:
        turns: Question and answer of each turn.
    """
    return tuple((question_text(question), f" {answer}") for question, answer in turns)


def dialogue_prompt(
    turns: Sequence[tuple[str, str]], question: str, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Return the tokens of a conversation so far and of a new question, tokenised as in training.

    Args:
        turns: Earlier questions and answers.
        question: The new question.
        tokenizer: Of the language model; its EOS ends every answer.
    """
    earlier = tokenize([conversation_turns(turns)], tokenizer, sys.maxsize)[0].token_ids
    return earlier + encode([question_text(question)], tokenizer)[0]


def tokenize(
    texts: Sequence[Turns], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> list[TokenizedText]:
    """Tokenise texts.

    Args:
        texts: Any number of texts.
        tokenizer: Of the language model; its EOS ends every target.
        max_tokens: Most tokens of a text. Turns beyond are left out; a first turn that is longer
            is cut, and then has no EOS.
    """
    # Strings of all turns in one call, which is faster; they come back in the same order.
    pieces = iter(encode([part for text in texts for turn in text for part in turn], tokenizer))
    eos = tokenizer.eos_token_id
    return [
        _join([(next(pieces), next(pieces) + [eos]) for _ in text], max_tokens) for text in texts
    ]


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokenise strings, in training and generation alike.

    A special token spelled out in a string is plain text: an EOS in a caption ends nothing.
    """
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)
    token_ids: list[list[int]] = encoded["input_ids"]
    return token_ids


def _join(turns: list[tuple[list[int], list[int]]], max_tokens: int) -> TokenizedText:
    """Join the tokens of prompts and targets, up to the last turn that fits."""
    token_ids: list[int] = []
    is_target: list[bool] = []
    end = 0
    for prompt, target in turns:
        token_ids += prompt + target
        is_target += [False] * len(prompt) + [True] * len(target)
        if len(token_ids) <= max_tokens:
            end = len(token_ids)
    # A first turn that is too long is cut.
    end = end or max_tokens
    return TokenizedText(token_ids[:end], is_target[:end], was_cut=end < len(token_ids))
