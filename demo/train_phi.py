"""Trains the tiny Phi on the world's text alone: to say what follows from what it has read.

A document is a scene written down in one of several forms, followed directly by captions and by
questions with their answers. No picture is involved: that patches can take the place of the
writing is what the projector learns later.

Letters: B documents, T positions, W words at one position, H width.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

from demo.captions import caption
from demo.contexts import facts, inventory, notes, raster
from demo.questions import CAPTION_REQUEST, ask
from demo.scenes import Scene, scene_at
from demo.tokenizer import prompt

_STEPS = 3500
_BATCH = 20
_LEARNING_RATE = 2e-3
_WARM_UP = 100
_WEIGHT_DECAY = 0.02
_NUM_TURNS = 5
_CONTEXT_WEIGHT = 0.05
"""Weight of a context's or question's token in the loss; an answer's has 1."""

_CAPTION_WEIGHT = 0.4
"""Weight of a caption's token: much about it is the describer's choice, which is only noise."""

_NOISE = 0.02
"""Standard deviation of what is added to every embedding, so that near it is good enough."""

_SPARE_ROWS = 64
"""Embedding rows beyond the tokenizer, which Phi-2 has too."""


@dataclass
class Document:
    """A text by positions; a position holds one token, or the words of a raster's cell."""

    words: list[list[int]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    """How much the loss minds that this position is predicted."""

    def add(self, tokens: Sequence[int], weight: float) -> None:
        """Append tokens, one a position."""
        self.words += [[token] for token in tokens]
        self.weights += [weight] * len(tokens)

    def add_mixed(self, cells: Sequence[Sequence[int]]) -> None:
        """Append cells, each one position of several tokens, which no loss minds."""
        self.words += [list(cell) for cell in cells]
        self.weights += [0.0] * len(cells)


def phi_config(tokenizer: PreTrainedTokenizerFast) -> PhiConfig:
    """Return Phi-2's configuration in small: same layout, same odd vocabulary."""
    rows = -(-(len(tokenizer) + _SPARE_ROWS) // 64) * 64
    return PhiConfig(
        vocab_size=rows,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        # Phi-2's "gelu_new" in one fused step: the same numbers, several times faster here.
        hidden_act="gelu_pytorch_tanh",
        max_position_embeddings=512,
        # The root of one over the width or so: with Phi-2's 0.02, heads this narrow hardly attend.
        initializer_range=0.07,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.5,
        },
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attention_dropout=0.0,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        tie_word_embeddings=False,
    )


def train_phi(out: Path, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Train and write model (float16) and tokenizer to a folder, as `save_pretrained` does."""
    torch.manual_seed(seed)
    model = PhiForCausalLM(phi_config(tokenizer))
    writer = Writer(tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), _LEARNING_RATE, betas=(0.9, 0.98), weight_decay=_WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _learning_rate_at)
    progress = tqdm(range(_STEPS), desc="phi")
    for step in progress:
        documents = [writer.document(seed, step * _BATCH + index) for index in range(_BATCH)]
        loss = document_loss(model, documents, _NOISE)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)


class Writer:
    """Writes documents; remembers the tokens of texts that come again and again."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def document(self, seed: int, index: int) -> Document:
        """Return one document of an endless list: a pure function of its arguments."""
        rng = random.Random(f"{seed}/document/{index}")
        scene = scene_at(seed, "phi", index)
        document = Document()
        self.add_context(document, scene, rng)
        parts = [self.add_captions, self.add_turns, self.add_facts]
        rng.shuffle(parts)
        for add in parts:
            add(document, scene, rng)
        return document

    def add_context(self, document: Document, scene: Scene, rng: random.Random) -> None:
        """Append a scene in one of the forms, most often as a raster of mixed words."""
        form = rng.random()
        if form < 0.05:
            document.add(self.ids(notes(scene, rng)), _CONTEXT_WEIGHT)
        elif form < 0.1:
            document.add(self.ids(inventory(scene, rng)), _CONTEXT_WEIGHT)
        elif form < 0.15:
            cells = raster(scene, rng, share=0.95, seen_only=False)
            words = "".join(f" {word}" for cell in cells for word in cell)
            document.add(self.ids(words), _CONTEXT_WEIGHT)
        else:
            cells = raster(scene, rng, share=0.95, seen_only=form > 0.3)
            document.add_mixed([[self.ids(f" {word}")[0] for word in cell] for cell in cells])

    def add_captions(self, document: Document, scene: Scene, rng: random.Random) -> None:
        """Append a caption with its end."""
        end = self._tokenizer.eos_token_id
        document.add([*self.ids(caption(scene, rng)), end], _CAPTION_WEIGHT)

    def add_turns(self, document: Document, scene: Scene, rng: random.Random) -> None:
        """Append questions, each with its answer and that answer's end."""
        for question, answer in ask(scene, rng, _NUM_TURNS):
            document.add(self.ids(prompt(question)), _CONTEXT_WEIGHT)
            weight = _CAPTION_WEIGHT if question == CAPTION_REQUEST else 1.0
            document.add([*self.ids(f" {answer}"), self._tokenizer.eos_token_id], weight)

    def add_facts(self, document: Document, scene: Scene, rng: random.Random) -> None:
        """Append nouns, each with what is known of it.

        To go on after a noun takes one look at where it was seen. An answer takes the same look,
        but needs its result some words later: the one is a step on the way to the other.
        """
        for noun, told in facts(scene, rng):
            document.add(self.ids(f" {noun}:"), _CONTEXT_WEIGHT)
            document.add(self.ids(f" {told}\n"), 1.0)

    def ids(self, text: str) -> list[int]:
        """Return a text's tokens."""
        if text not in self._known:
            self._known[text] = self._tokenizer(text)["input_ids"]
        return self._known[text]


def document_loss(
    model: PhiForCausalLM, documents: Sequence[Document], noise: float
) -> torch.Tensor:
    """Return the weighted mean of the next-token losses over all documents."""
    words_BTW, weights_BT = _padded(documents)
    present_BTW = (words_BTW >= 0).float()
    # A sum of words grows with the root of their number; a projector may scale as it likes.
    scale_BT1 = present_BTW.sum(-1, keepdim=True).clamp(min=1).rsqrt()
    embeddings_BTWH = model.get_input_embeddings()(words_BTW.clamp(min=0))
    embeds_BTH = (embeddings_BTWH * present_BTW[..., None]).sum(2) * scale_BT1
    embeds_BTH = embeds_BTH + noise * torch.randn_like(embeds_BTH)
    hidden_BTH = model.model(inputs_embeds=embeds_BTH, use_cache=False).last_hidden_state
    minded_BT = weights_BT[:, 1:] > 0
    logits = model.lm_head(hidden_BTH[:, :-1][minded_BT])
    losses = torch.nn.functional.cross_entropy(
        logits, words_BTW[:, 1:, 0][minded_BT], reduction="none"
    )
    weights = weights_BT[:, 1:][minded_BT]
    return (losses * weights).sum() / weights.sum()


def _padded(documents: Sequence[Document]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return words [B, T, W] with -1 where there is none, and weights [B, T]."""
    length = max(len(document.words) for document in documents)
    most = max(len(cell) for document in documents for cell in document.words)
    words = [
        [cell + [-1] * (most - len(cell)) for cell in document.words]
        + [[-1] * most] * (length - len(document.words))
        for document in documents
    ]
    weights = [
        document.weights + [0.0] * (length - len(document.weights)) for document in documents
    ]
    return torch.tensor(words), torch.tensor(weights)


def _learning_rate_at(step: int) -> float:
    """Return the share of the full learning rate: a linear start, then a half cosine."""
    if step < _WARM_UP:
        return (step + 1) / _WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (step - _WARM_UP) / (_STEPS - _WARM_UP)))
