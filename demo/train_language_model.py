"""Trains the tiny language models, a Phi and a Llama, on the world's text alone.

A document is a scene written down in one of several forms, followed by captions and by questions
with their answers. No picture is involved: the projector learns later to put patches in the place
of the written scene. Phi reads questions in Phi-2's format, the Llama in the chat template of its
tokenizer.

Letters: B documents, T positions, W words at one position, H width.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from demo.captions import caption
from demo.contexts import facts, inventory, notes, raster
from demo.questions import CAPTION_REQUEST, ask
from demo.scenes import Scene, scene_at
from demo.tokenizer import END_OF_TEXT, END_OF_TURN, START_OF_TURN, chat_tokenizer, prompt

_STEPS = 3500
_BATCH = 20
_LEARNING_RATE = 2e-3
_WARM_UP = 100
_WEIGHT_DECAY = 0.02
_NUM_TURNS = 5
_CONTEXT_WEIGHT = 0.05
"""Loss weight of the tokens of contexts and questions; those of answers weigh 1."""

_CAPTION_WEIGHT = 0.4
"""Loss weight of the tokens of captions, whose wording is partly random."""

_NOISE = 0.02
"""Standard deviation of the noise on every embedding, so that similar embeddings mean the same."""

_SPARE_ROWS = 64
"""Embedding rows beyond the tokenizer's, as in Phi-2."""


@dataclass
class Document:
    """A text as positions; each holds one token, or the words of a raster's cell."""

    words: list[list[int]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    """Loss weight of each position's prediction."""

    def add(self, tokens: Sequence[int], weight: float) -> None:
        """Append tokens, one per position."""
        self.words += [[token] for token in tokens]
        self.weights += [weight] * len(tokens)

    def add_mixed(self, cells: Sequence[Sequence[int]]) -> None:
        """Append cells, each one position of several tokens, without a loss."""
        self.words += [list(cell) for cell in cells]
        self.weights += [0.0] * len(cells)


@dataclass(frozen=True)
class Style:
    """The constant texts of a document."""

    lead: str
    """In front of the scene."""
    question: str
    """A question with what follows it, up to its answer."""
    answer: str
    end: str
    """Behind a caption or an answer."""
    turn: str
    """Between an end and the next question."""


PHI_2 = Style(lead="", question=prompt("{}"), answer=" {}", end=END_OF_TEXT, turn="")
CHAT = Style(
    lead=f"{START_OF_TURN}user\n",
    question=f"{{}}{END_OF_TURN}\n{START_OF_TURN}assistant\n",
    answer="{}",
    end=END_OF_TURN,
    turn=f"\n{START_OF_TURN}user\n",
)


def llama_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Return a small configuration with the layout of SmolLM2: shared keys, tied output layer."""
    return LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.07,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        tie_word_embeddings=True,
    )


def phi_config(tokenizer: PreTrainedTokenizerFast) -> PhiConfig:
    """Return a small configuration with Phi-2's layout, and like its, an odd vocabulary."""
    rows = -(-(len(tokenizer) + _SPARE_ROWS) // 64) * 64
    return PhiConfig(
        vocab_size=rows,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        # The same function as Phi-2's "gelu_new", fused and several times faster here.
        hidden_act="gelu_pytorch_tanh",
        max_position_embeddings=512,
        # About 1 / sqrt(width): with Phi-2's 0.02, the attention of heads this narrow is flat.
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
    """Train the Phi, and write it."""
    _train(out, tokenizer, phi_config(tokenizer), PHI_2, seed)


def train_llama(out: Path, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Train the Llama, and write it; its tokenizer has two more entries and a chat template."""
    tokenizer = chat_tokenizer(tokenizer)
    _train(out, tokenizer, llama_config(tokenizer), CHAT, seed)


def _train(
    out: Path,
    tokenizer: PreTrainedTokenizerFast,
    config: PreTrainedConfig,
    style: Style,
    seed: int,
) -> None:
    """Train, and write model (float16) and tokenizer to a folder with `save_pretrained`."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    writer = Writer(tokenizer, style)
    optimizer = torch.optim.AdamW(
        model.parameters(), _LEARNING_RATE, betas=(0.9, 0.98), weight_decay=_WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _learning_rate_at)
    progress = tqdm(range(_STEPS), desc=config.model_type)
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
    """Writes documents; caches the tokens of texts, which repeat often."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, style: Style = PHI_2) -> None:
        self._tokenizer = tokenizer
        self._style = style
        self._tokens: dict[str, list[int]] = {}

    def document(self, seed: int, index: int) -> Document:
        """Return a document of an endless list, as a pure function of the arguments."""
        rng = random.Random(f"{seed}/document/{index}")
        scene = scene_at(seed, "phi", index)
        document = Document()
        document.add(self.ids(self._style.lead), _CONTEXT_WEIGHT)
        self.add_context(document, scene, rng)
        parts = [self.add_captions, self.add_turns, self.add_facts]
        rng.shuffle(parts)
        for number, add in enumerate(parts):
            if number:
                document.add(self.ids(self._style.turn), _CONTEXT_WEIGHT)
            add(document, scene, rng)
        return document

    def add_request(self, document: Document, question: str = "") -> None:
        """Append a question; in a chat, what the assistant says by itself answers an empty one."""
        if question or self._style is CHAT:
            document.add(self.ids(self._style.question.format(question)), _CONTEXT_WEIGHT)

    def add_context(self, document: Document, scene: Scene, rng: random.Random) -> None:
        """Append a scene in a random form, most often as a raster of cells."""
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
        """Append a caption and its end token."""
        self.add_request(document)
        text = self.ids(caption(scene, rng)) + self.ids(self._style.end)
        document.add(text, _CAPTION_WEIGHT)

    def add_turns(self, document: Document, scene: Scene, rng: random.Random) -> None:
        """Append questions, each with its answer and an end token."""
        for number, (question, answer) in enumerate(ask(scene, rng, _NUM_TURNS)):
            if number:
                document.add(self.ids(self._style.turn), _CONTEXT_WEIGHT)
            self.add_request(document, question)
            weight = _CAPTION_WEIGHT if question == CAPTION_REQUEST else 1.0
            text = self.ids(self._style.answer.format(answer)) + self.ids(self._style.end)
            document.add(text, weight)

    def add_facts(self, document: Document, scene: Scene, rng: random.Random) -> None:
        """Append nouns, each with its facts.

        Continuing after a noun takes one look-up of its cell. An answer takes the same look-up but
        uses its result some words later, so that facts are a step towards answers.
        """
        self.add_request(document)
        for noun, fact in facts(scene, rng):
            document.add(self.ids(f" {noun}:"), _CONTEXT_WEIGHT)
            document.add(self.ids(f" {fact}\n"), 1.0)
        if self._style is CHAT:
            document.add(self.ids(self._style.end), _CONTEXT_WEIGHT)

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        if text not in self._tokens:
            self._tokens[text] = self._tokenizer(text)["input_ids"]
        return self._tokens[text]


def document_loss(
    model: PreTrainedModel, documents: Sequence[Document], noise: float
) -> torch.Tensor:
    """Return the weighted mean of the next-token losses over all documents."""
    words_BTW, weights_BT = _padded(documents)
    present_BTW = (words_BTW >= 0).float()
    # The norm of a sum grows with the root of the number of words; a projector scales freely.
    scale_BT1 = present_BTW.sum(-1, keepdim=True).clamp(min=1).rsqrt()
    embeddings_BTWH = model.get_input_embeddings()(words_BTW.clamp(min=0))
    embeds_BTH = (embeddings_BTWH * present_BTW[..., None]).sum(2) * scale_BT1
    embeds_BTH = embeds_BTH + noise * torch.randn_like(embeds_BTH)
    hidden_BTH = model.base_model(inputs_embeds=embeds_BTH, use_cache=False).last_hidden_state
    is_target_BT = weights_BT[:, 1:] > 0
    logits = model.get_output_embeddings()(hidden_BTH[:, :-1][is_target_BT])
    losses = torch.nn.functional.cross_entropy(
        logits, words_BTW[:, 1:, 0][is_target_BT], reduction="none"
    )
    weights = weights_BT[:, 1:][is_target_BT]
    return (losses * weights).sum() / weights.sum()


def _padded(documents: Sequence[Document]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return words [B, T, W], padded with -1, and weights [B, T]."""
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
    """Return the factor of the learning rate: a linear warm-up, then a cosine decay."""
    if step < _WARM_UP:
        return (step + 1) / _WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (step - _WARM_UP) / (_STEPS - _WARM_UP)))
