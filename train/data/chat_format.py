"""Finds the prompt format of a tokenizer's own chat template.

The template is rendered with different texts, and the constant parts are what the renderings
share: first as text, then as tokens. No marker is searched for. The format found is then checked
against the tokenizer's own rendering of whole conversations.

A conversation here is a list of texts, by user and assistant in turn, and ends with a user's:
some templates write the last answer in another way than earlier ones.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from os.path import commonprefix
from typing import Any

from transformers import PreTrainedTokenizerBase

from cache.errors import PatchcacheError
from cache.files.foreign import reading_foreign_file
from train.data.prompts import (
    Ids,
    PromptFormat,
    Slot,
    Turns,
    Wording,
    caption_turns,
    conversation_turns,
    encode,
    tokenize,
)

PROBES = (
    "no", "What is in the box?", "12 dogs.", "Äpfel und Öl", "犬がいる", "🙂 yes 🙂", "(a) two\n\nlines\n(b)",
    '"quoted"', "- one\n- two:", "é", "3.5", "<b> x >", "# Title *", "it's 7",
)  # fmt: skip
"""Texts whose first and last characters are of many kinds; the first is plain letters."""

ANCHORS = ("", "\n")
"""Texts put before a slot: with the second one, no slot starts what is tokenised, and SentencePiece
marks no start of a word that the template's special tokens would have kept from it."""

DATE = datetime(2024, 7, 26)
"""Today's date for a template that writes it: a run means the same on another day. The date is the
default of Llama 3's template."""

DATE_PARTS = "dbBmyYaAjHMS"
"""Letters of strftime's format that a template may use."""

FIXED_DATE = (
    "{% macro strftime_now(format) -%} {{- format"
    + "".join(f"|replace('%{part}', '{DATE.strftime('%' + part)}')" for part in DATE_PARTS)
    + " -}} {%- endmacro +%}"
)
"""Stands before a template, and writes nothing. Transformers passes no functions to templates."""

Refuse = Callable[[str], PatchcacheError]


@dataclass(frozen=True)
class _Constants:
    """The constant texts of a template, in the order of a conversation."""

    start: str
    """Up to the first user's text."""
    to_answer: str
    """Between a user's text and the assistant's."""
    to_question: str
    """Between an assistant's text and the next user's."""
    end: str
    """Behind the last user's text."""

    def spans(self, contents: Sequence[str]) -> list[tuple[int, int]]:
        """Return where each text of a conversation begins and ends in its rendering."""
        between = itertools.cycle((self.to_answer, self.to_question))
        place, spans = len(self.start), []
        for text in contents:
            spans.append((place, place + len(text)))
            place += len(text) + len(next(between))
        return spans

    def render(self, contents: Sequence[str]) -> str:
        """Return the rendering of a conversation."""
        between = itertools.cycle((self.to_answer, self.to_question))
        joined = [part for text in contents for part in (text, next(between))][:-1]
        return "".join([self.start, *joined, self.end])


def chat_format(
    tokenizer: PreTrainedTokenizerBase, end_ids: set[int], refuse: Refuse
) -> PromptFormat:
    """Return the prompt format of a tokenizer's chat template.

    Args:
        tokenizer: Of the language model; has a chat template.
        end_ids: Tokens at which generation stops, beside the template's own end of a turn.
        refuse: Makes the error from a line that says what is wrong with the template.

    Raises:
        PatchcacheError: From `refuse`: the template cannot be rendered, changes texts, or its turns
            cannot be told apart.
    """
    template = _Template(tokenizer, refuse)
    prompt_format = _Layout(template, template.constants()).prompt_format(end_ids)
    _check(prompt_format, template)
    return prompt_format


class _Template:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, refuse: Refuse) -> None:
        self.tokenizer = tokenizer
        self.refuse = refuse
        with reading_foreign_file(refuse):
            self._text = FIXED_DATE + tokenizer.get_chat_template()
        self.added = {
            token_id
            for token_id, token in tokenizer.added_tokens_decoder.items()
            # Gemma's line breaks are added tokens, and text.
            if not token.content.isspace()
        }
        """Ids of tokens that text around them never merges with."""

    def render(self, contents: Sequence[str]) -> str:
        """Return the text of a conversation."""
        text: str = self._apply(contents, tokenize=False)
        return text

    def token_ids(self, contents: Sequence[str]) -> list[int]:
        """Return the tokens of a conversation."""
        ids: list[int] = self._apply(contents, tokenize=True, return_dict=False)
        return ids

    def _apply(self, contents: Sequence[str], **options: Any) -> Any:
        messages = [
            {"role": role, "content": text}
            for role, text in zip(itertools.cycle(("user", "assistant")), contents, strict=False)
        ]
        with reading_foreign_file(self.refuse):
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self._text, **options
            )

    def constants(self) -> _Constants:
        """Return the constant texts, found by rendering different conversations."""
        single = [self.render([probe]) for probe in PROBES]
        start, end = _shared(single)
        pairs = [self.render([PROBES[0], probe, PROBES[0]]) for probe in PROBES]
        before, after = _shared(pairs)
        constants = _Constants(
            start=start,
            to_answer=before[len(start) + len(PROBES[0]) :],
            to_question=after[: max(0, len(after) - len(PROBES[0]) - len(end))],
            end=end,
        )
        for turns in _conversations():
            contents = _contents(turns)
            if constants.render(contents) != self.render(contents):
                raise self.refuse(
                    f"it writes {len(turns)} turns in another way than a single one, or changes "
                    f"their texts"
                )
        return constants


def _conversations() -> Iterator[Turns]:
    """Yield a caption, and conversations of one to three turns."""
    yield caption_turns(PROBES[1])
    for number in range(len(PROBES)):
        texts = itertools.islice(itertools.cycle(PROBES), number, None)
        turns = [(next(texts), next(texts)) for _ in range(1 + number % 3)]
        yield conversation_turns(turns)


def _contents(turns: Turns) -> list[str]:
    """Return the texts of a conversation that goes on with another question."""
    return [*(text or "" for turn in turns for text in turn), PROBES[0]]


class _Layout:
    """Where the tokens of a conversation of three user's texts stand."""

    def __init__(self, template: _Template, constants: _Constants) -> None:
        self._template = template
        self._constants = constants
        self._base = [PROBES[0]] * 5
        self._text = constants.render(self._base)
        self._spans = constants.spans(self._base)
        encoded = template.tokenizer(
            self._text, add_special_tokens=False, return_offsets_mapping=True
        )
        self._ids: list[int] = encoded["input_ids"]
        self._offsets: list[tuple[int, int]] = encoded["offset_mapping"]
        # A first user's text may be empty: a caption is asked for with the picture alone.
        self._probes = (("", *PROBES), PROBES, PROBES)
        self._variants = [
            [self._with(place, probe) for probe in probes]
            for place, probes in enumerate(self._probes)
        ]
        self._bounds = [_common_lengths(variants) for variants in self._variants]

    def _with(self, place: int, probe: str) -> list[int]:
        contents = [*self._base]
        contents[place] = probe
        return self._template.token_ids(contents)

    def prompt_format(self, end_ids: set[int]) -> PromptFormat:
        """Cut the conversation into the constant tokens of a format."""
        length = len(self._ids)
        ends = [length - suffix for _, suffix in self._bounds]
        starts = [prefix for prefix, _ in self._bounds]
        if ends[0] > starts[1] or ends[1] > starts[2]:
            raise self._template.refuse("nothing stands between question and answer")
        between = self._ids[ends[1] : starts[2]]
        is_end = [token_id in self._template.added for token_id in between]
        if not any(is_end):
            raise self._template.refuse("no special token ends an answer")
        closing = is_end.index(True) + 1
        lead, ask = tuple(self._ids[: starts[0]]), tuple(self._ids[ends[0] : starts[1]])
        encoder = _text_encoder(self._template, {*lead, *ask, *between})
        first, answer, later = self._slots(encoder)
        end_of_turn = between[closing - 1]
        return PromptFormat(
            name="chat",
            tokenizer=self._template.tokenizer,
            encoder=encoder,
            lead=lead,
            first_question=first,
            later_question=later,
            answer=answer,
            caption=(first, answer),
            ask=ask,
            closing=tuple(between[:closing]),
            turn=tuple(between[closing:]),
            end_ids=tuple(sorted(end_ids | {end_of_turn})),
            strips=True,
            wording=self._wording(starts[0], starts[1], ends[1] + closing),
        )

    def _slots(self, encoder: PreTrainedTokenizerBase) -> list[Slot]:
        """Return the slots of the first question, its answer and the second question."""
        for anchor in ANCHORS:
            slots = [self._slot(place, anchor, encoder) for place in range(3)]
            if all(self._gives_own_tokens(place, slots[place], encoder) for place in range(3)):
                return slots
        raise self._template.refuse("the tokens of its constant parts depend on the texts")

    def _slot(self, place: int, anchor: str, encoder: PreTrainedTokenizerBase) -> Slot:
        """Return a text's slot: the constant text around it, up to the next added tokens."""
        start, end = self._spans[place]
        previous = self._spans[place - 1][1] if place else 0
        added = [
            span
            for token_id, span in zip(self._ids, self._offsets, strict=True)
            if token_id in self._template.added
        ]
        left = max([previous, *(stop for begin, stop in added if begin < start)])
        right = min([self._spans[place + 1][0], *(begin for begin, _ in added if begin >= end)])
        # An added token may take the white space behind it.
        before, after = anchor + self._text[min(left, start) : start], self._text[end:right]
        encoded = encode([before + probe + after for probe in self._probes[place]], encoder)
        prefix, suffix = _common_lengths(encoded)
        ids = encoded[0]
        return Slot(before, after, tuple(ids[:prefix]), tuple(ids[len(ids) - suffix :]))

    def _gives_own_tokens(
        self, place: int, slot: Slot, encoder: PreTrainedTokenizerBase
    ) -> bool:
        """Return whether texts have the same tokens in the slot as in whole conversations."""
        prefix, suffix = self._bounds[place]
        texts = [slot.before + probe + slot.after for probe in self._probes[place]]
        return [slot.cut(ids) for ids in encode(texts, encoder)] == [
            ids[prefix : len(ids) - suffix] for ids in self._variants[place]
        ]

    def _wording(self, lead: int, prompt: int, turn: int) -> Wording:
        """Return the constant texts, cut where the constant tokens are cut.

        Args:
            lead: Number of tokens before the patches.
            prompt: Number of tokens before the first answer.
            turn: Number of tokens up to the end of the first answer's closing.
        """
        place = [0, *(end for _, end in self._offsets)]
        text, (_, asked), (answer, answered), (later, _), *_ = self._text, *self._spans
        return Wording(
            lead=text[: place[lead]],
            first_question=text[place[lead] : self._spans[0][0]],
            later_question=text[place[turn] : later],
            ask=text[asked : place[prompt]],
            answer=text[place[prompt] : answer],
            closing=text[answered : place[turn]],
        )


def _text_encoder(template: _Template, constant_ids: set[int]) -> PreTrainedTokenizerBase:
    """Return a tokenizer for which the template's own tokens, spelled out in a text, are text.

    Some checkpoints do not mark theirs as special.
    """
    tokenizer = template.tokenizer
    tokens = [tokenizer.added_tokens_decoder[i] for i in sorted(constant_ids & template.added)]
    not_special = [token.content for token in tokens if not token.special]
    if not not_special:
        return tokenizer
    encoder = copy.deepcopy(tokenizer)
    encoder.backend_tokenizer.add_special_tokens(not_special)
    return encoder


def _check(prompt_format: PromptFormat, template: _Template) -> None:
    """Refuse a format whose sequences differ from the tokenizer's own."""
    tokenizer = template.tokenizer
    for turns in _conversations():
        (text,) = tokenize([turns], prompt_format, 1 << 30)
        found: Ids = (*prompt_format.lead, *text.token_ids, *prompt_format.turn)
        wanted = tuple(template.token_ids(_contents(turns)))
        if wanted[: len(found)] != found:
            place = len(commonprefix([wanted, found]))
            tokens = [
                tokenizer.convert_ids_to_tokens(list(ids[place : place + 3]))
                for ids in (wanted, found)
            ]
            raise template.refuse(
                f"{len(turns)} turns: the tokenizer writes {tokens[0]} at token {place}, the parts "
                f"that were found give {tokens[1]}"
            )


def _shared(texts: Sequence[str]) -> tuple[str, str]:
    """Return the longest common prefix and suffix of texts."""
    prefix = commonprefix(list(texts))
    suffix = commonprefix([text[len(prefix) :][::-1] for text in texts])[::-1]
    return prefix, suffix


def _common_lengths(sequences: Sequence[list[int]]) -> tuple[int, int]:
    """Return the lengths of the longest common prefix and suffix, which do not overlap."""
    prefix = len(commonprefix(list(sequences)))
    suffix = len(commonprefix([ids[prefix:][::-1] for ids in sequences]))
    return prefix, suffix
