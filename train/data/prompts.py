"""Builds the token sequences around the patches of an image, and their loss masks.

A text is a list of turns, each with a question and a target. Targets are captions or answers; the
tokens that close a turn follow each of them, so that the model learns to stop. A prompt format
decides which tokens stand around questions and targets. Prompts and targets are tokenised apart:
" answer" and "answer" are different tokens, and training must cut a text where generation does.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import xxhash
from transformers import PreTrainedTokenizerBase

from cache.files.atomic import canonical_json

Turns = tuple[tuple[str | None, str], ...]
"""Question and target of each turn of a text; a caption is one turn with None as its question."""

Ids = tuple[int, ...]
"""Token ids."""


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


@dataclass(frozen=True)
class Slot:
    """A place for a text of the data, between constant texts.

    A text is tokenised together with the constant text around it, because its first token may
    differ from that of the text alone: SentencePiece marks the start of a word.
    """

    before: str = ""
    after: str = ""
    head: Ids = ()
    """First tokens of `before` and any text, which belong to the constant tokens before."""
    tail: Ids = ()
    """Last tokens of any text and `after`, which belong to the constant tokens after."""

    def cut(self, token_ids: list[int]) -> list[int] | None:
        """Return the tokens between head and tail.

        Returns:
            None if the text's first or last characters merged with a constant token.
        """
        end = len(token_ids) - len(self.tail)
        start = len(self.head)
        if start > end or (*token_ids[:start], *token_ids[end:]) != (*self.head, *self.tail):
            return None
        return token_ids[start:end]


@dataclass(frozen=True)
class Wording:
    """The constant texts of a prompt format, in the order of a conversation."""

    lead: str
    first_question: str
    """Between the picture and the first question."""
    later_question: str
    """Between the end of a turn and the next question."""
    ask: str
    """Behind a question; ends a prompt."""
    answer: str
    """Before an answer."""
    closing: str
    """Behind an answer."""


@dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """Which tokens stand around pictures, questions and answers.

        lead   patches   [first question] ask   [answer] closing   turn [later question] ask   ...
    """

    name: Literal["phi", "chat", "plain"]
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    encoder: PreTrainedTokenizerBase = field(repr=False)
    """Tokenises the texts of the data: the tokenizer, or a copy for which more tokens are special.
    """
    lead: Ids
    """Tokens before the patches, the same for every text."""
    first_question: Slot
    later_question: Slot
    answer: Slot
    caption: tuple[Slot, Slot]
    """Slots of the empty question before a caption, and of the caption."""
    ask: Ids
    """Behind a question; the last tokens of a prompt."""
    closing: Ids
    """Behind an answer; supervised."""
    turn: Ids
    """Between the closing and the next question."""
    end_ids: Ids
    """The tokens at which generation stops, ascending."""
    strips: bool
    """Whether white space around a text is dropped."""
    wording: Wording = field(repr=False)

    def slots(self, number: int, question: str | None) -> tuple[Slot, Slot]:
        """Return the slots of a turn's question and answer.

        Args:
            number: Of the turn, from 0.
            question: None for a caption.
        """
        if question is None:
            return self.caption
        return self.later_question if number else self.first_question, self.answer

    def encode_in_slots(self, parts: Sequence[tuple[Slot, str]]) -> list[list[int]]:
        """Tokenise texts, each in its slot, in one call.

        A text whose first or last characters merge with a constant token is tokenised alone.
        """
        texts = [text.strip() if self.strips else text for _, text in parts]
        slots = [slot for slot, _ in parts]
        in_context = encode(
            [slot.before + text + slot.after for slot, text in zip(slots, texts, strict=True)],
            self.encoder,
        )
        token_ids = []
        for slot, text, ids in zip(slots, texts, in_context, strict=True):
            within = slot.cut(ids)
            token_ids.append(encode([text], self.encoder)[0] if within is None else within)
        return token_ids

    def prompts(self, questions: Sequence[str | None]) -> list[list[int]]:
        """Return the tokens between the patches and the answer of each question.

        Args:
            questions: None for a caption.
        """
        parts = [(self.slots(0, question)[0], question or "") for question in questions]
        return [[*ids, *self.ask] for ids in self.encode_in_slots(parts)]

    def dialogue_prompt(
        self, turns: Sequence[tuple[str, str]], question: str
    ) -> list[int]:
        """Return the tokens behind the patches of a conversation so far and of a new question.

        They are the first tokens of the same conversation in training.

        Args:
            turns: Earlier questions and answers.
            question: The new question.
        """
        if not turns:
            return self.prompts([question])[0]
        earlier = tokenize([conversation_turns(turns)], self, sys.maxsize)[0].token_ids
        (asked,) = self.encode_in_slots([(self.later_question, question)])
        return [*earlier, *self.turn, *asked, *self.ask]

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of generated tokens, without special tokens and outer white space."""
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text.strip()

    def identity(self) -> dict[str, str]:
        """Return what distinguishes a run in this format from one in Phi-2's.

        Returns:
            Nothing for Phi-2's format, in which all runs without an entry were trained; else
            `prompt`: the format's name and a hash of its constants.
        """
        if self.name == "phi":
            return {}
        slots = (self.first_question, self.later_question, self.answer, *self.caption)
        constants = [self.lead, self.ask, self.closing, self.turn, *map(vars, slots)]
        return {"prompt": f"{self.name} {xxhash.xxh3_128(canonical_json(constants)).hexdigest()}"}


def caption_turns(caption: str) -> Turns:
    """Return the turns of a caption: a single target, for the picture alone."""
    return ((None, caption),)


def conversation_turns(turns: Sequence[tuple[str, str]]) -> Turns:
    """Return the turns of a conversation: questions and answers."""
    return tuple(turns)


def tokenize(
    texts: Sequence[Turns], prompt_format: PromptFormat, max_tokens: int
) -> list[TokenizedText]:
    """Tokenise texts, as they stand behind the patches.

    Args:
        texts: Any number of texts.
        prompt_format: Of the language model.
        max_tokens: Most tokens of a text. Turns beyond are left out; a first turn that is longer
            is cut, and then has no end.
    """
    # Strings of all turns in one call, which is faster; they come back in the same order.
    parts = [
        part
        for text in texts
        for number, (question, target) in enumerate(text)
        for part in zip(
            prompt_format.slots(number, question), (question or "", target), strict=True
        )
    ]
    pieces = iter(prompt_format.encode_in_slots(parts))

    def turn(number: int) -> tuple[list[int], list[int]]:
        start = prompt_format.turn if number else ()
        prompt = [*start, *next(pieces), *prompt_format.ask]
        return prompt, [*next(pieces), *prompt_format.closing]

    return [_join([turn(number) for number in range(len(text))], max_tokens) for text in texts]


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
