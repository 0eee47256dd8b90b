"""What the tests of training need beside the tiny world of `tests/conftest.py`."""

import numpy as np
import pytest
import torch

from tests.train.data.chat_tokenizers import chat_tokenizer
from tests.train.images import Image
from tests.train.stage_server import StageServer
from train.data.chat_format import chat_format
from train.data.examples import Examples
from train.data.prompts import TokenizedText
from train.loop.setup import TrainingSetup
from train.settings import PretrainSettings


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def random_images():
    """Make images with random texts, of which a random part is learned."""

    def make(seed, *, count=9, most_texts=4, longest=6):
        rng = np.random.default_rng(seed)
        return [
            Image(
                number,
                tuple(
                    TokenizedText(
                        rng.integers(1, 99, length).tolist(), (rng.random(length) < 0.6).tolist()
                    )
                    for length in rng.integers(1, longest + 1, rng.integers(1, most_texts + 1))
                ),
            )
            for number in range(count)
        ]

    return make


def examples_of(examples):
    """Return a list of examples as the tables would give them."""
    texts = [(example.image_id, text) for example in examples for text in example.texts]
    image_ids = np.array([image_id for image_id, _ in texts], dtype=np.int64)
    return Examples.grouped(image_ids, lambda number: texts[number][1])


@pytest.fixture(scope="session")
def chat_prompts():
    """The format of a chat template, of a tokenizer that fits the rows of the tiny Phi."""
    tokenizer = chat_tokenizer("ChatML with another EOS")
    return chat_format(tokenizer, {tokenizer.eos_token_id}, AssertionError)


@pytest.fixture
def settings(loop_values):
    def make(**changes):
        return PretrainSettings(**{**loop_values, "batch_captions": 8, **changes})

    return make


@pytest.fixture
def make_setup(make_model, prompt_format, store, settings):
    default = settings()

    def make(
        examples,
        *,
        validation=(),
        batch_size=8,
        learning_rate=1e-2,
        seed=0,
        model=None,
        settings=default,
    ):
        model = model or make_model(seed=seed)
        learning = [p for p in model.parameters() if p.requires_grad]
        return TrainingSetup(
            model=model,
            prompt_format=prompt_format,
            store=store,
            train=examples_of(examples),
            validation=examples_of(validation),
            batch_size=batch_size,
            optimizer=torch.optim.AdamW(learning, lr=learning_rate, weight_decay=0.0),
            seed=seed,
            settings=settings,
        )

    return make


class SilentTracker:
    """Remembers what it is told."""

    def __init__(self):
        self.rows, self.samples = [], []

    def log(self, step, values):
        self.rows.append((step, dict(values)))

    def log_samples(self, step, rows):
        self.samples.append((step, list(rows)))


@pytest.fixture
def tracker():
    return SilentTracker()


@pytest.fixture(scope="session")
def server():
    """Stages in processes of their own."""
    with StageServer() as started:
        yield started
