import pytest
import torch

from train.data.examples import Example
from train.data.prompts import caption_turns, conversation_turns
from train.loop.step import mean_loss
from train.loop.validation import SAMPLE_TOKENS, samples, validation_loss
from train.model.generate import generate

TRAIN = [Example(100, (caption_turns("a red cat"), caption_turns("the dog")))]
TURNS = [("where", "in the box"), ("how many", "two")]
VALIDATION = [
    Example(111, (conversation_turns(TURNS), conversation_turns(TURNS[1:]))),
    Example(112, (caption_turns("a blue dog"), caption_turns("a red cat"))),
    Example(113, (conversation_turns(TURNS[1:]),)),
]


@pytest.fixture
def setup(make_setup, settings):
    def setup(validation=VALIDATION, model=None, **changes):
        return make_setup(TRAIN, validation=validation, model=model, settings=settings(**changes))

    return setup


@pytest.mark.parametrize("images", [1, 2, 3, 99])
def test_the_loss_is_the_mean_over_the_first_images(setup, images):
    made = setup(validation_images=images)
    wanted = mean_loss(made.model, made.step_data(VALIDATION[:images]))
    assert validation_loss(made) == wanted
    if images < 3:
        assert validation_loss(setup(validation_images=images + 1)) != wanted


def test_it_is_the_same_however_it_is_cut(setup):
    losses = [
        validation_loss(setup(micro_batch_tokens=tokens, row_tokens=tokens))
        for tokens in (1, 60, 1000)
    ]
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-6)


def test_without_images_there_is_none(setup):
    assert validation_loss(setup(validation_images=0)) is None
    assert validation_loss(setup(validation=[])) is None
    assert samples(setup(samples=0)) == []
    assert samples(setup(validation=[])) == []


def test_nothing_of_it_is_random_or_left_behind(setup, make_model):
    """Dropout is off, no gradient is left, and the generator of the weights' noise is untouched."""
    made = setup(model=make_model(lora=0.5))
    made.model.train()
    torch.manual_seed(0)
    wanted = torch.random.get_rng_state()
    first = validation_loss(made), samples(made)
    torch.random.set_rng_state(wanted)
    made.model.train()
    assert (validation_loss(made), samples(made)) == first
    assert torch.equal(torch.random.get_rng_state(), wanted)
    learning = made.model.trainable_parameters()
    assert learning
    assert all(p.grad is None and not p.is_inference() for p in learning.values())


def test_samples_ask_the_first_question_and_show_the_right_answer(setup):
    made = setup(samples=2)
    first, second = samples(made)
    assert first[:2] == (111, "where\nin the box")
    assert second[:2] == (112, "a blue dog")
    generated = generate(
        made.model, made.prompt_format, made.store, [111, 112], ["where", None],
        max_tokens=SAMPLE_TOKENS, batch_size=1, description="test",
    )  # fmt: skip
    assert first[2] == f"where\n{generated[0].text}"
    assert second[2] == generated[1].text
    assert len(samples(setup(samples=99))) == len(VALIDATION)
