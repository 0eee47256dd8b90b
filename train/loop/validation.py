"""Validation on images that a run does not learn from: a loss, and texts to look at."""

from train.loop.setup import TrainingSetup
from train.loop.step import mean_loss
from train.model.generate import generate

SAMPLE_TOKENS = 48
"""Most tokens of a text that is generated during training."""


def validation_loss(setup: TrainingSetup) -> float | None:
    """Return the mean loss of a supervised token over the first validation images, if any."""
    examples = setup.validation[: setup.settings.validation_images]
    if not examples:
        return None
    return mean_loss(setup.model, setup.step_data(examples))


def samples(setup: TrainingSetup) -> list[tuple[int, str, str]]:
    """Generate a text for each of a few validation images.

    Returns:
        Image id, wanted text and generated text, both behind the question, if any.
    """
    examples = setup.validation[: setup.settings.samples]
    if not examples:
        return []
    first_turns = [example.texts[0][0] for example in examples]
    generations = generate(
        setup.model,
        setup.prompt_format,
        setup.store,
        [example.image_id for example in examples],
        [question for question, _ in first_turns],
        max_tokens=SAMPLE_TOKENS,
        batch_size=len(examples),
        description="samples",
    )
    return [
        (example.image_id, _shown(question, target), _shown(question, generation.text))
        for example, (question, target), generation in zip(
            examples, first_turns, generations, strict=True
        )
    ]


def _shown(question: str | None, text: str) -> str:
    return text if question is None else f"{question}\n{text}"
