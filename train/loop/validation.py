"""How a run does on images that it does not learn from: a loss, and texts to look at."""

from train.data.prompts import Text
from train.loop.setup import Task
from train.loop.step import mean_loss
from train.model.generate import generate

SAMPLE_TOKENS = 48
"""Most tokens of a text that is generated while training."""


def validation_loss(task: Task) -> float | None:
    """Return the mean loss of a supervised token over the first validation images, if any."""
    examples = task.validation[: task.settings.validation_images]
    if not examples:
        return None
    return mean_loss(task.model, task.step_data(examples))


def samples(task: Task) -> list[tuple[int, str, str]]:
    """Generate a text for a few validation images: image id, wanted, generated."""
    chosen = task.validation[: task.settings.samples]
    if not chosen:
        return []
    asked = [_first_question(example.texts[0]) for example in chosen]
    made = generate(
        task.model,
        task.tokenizer,
        task.store,
        [example.image_id for example in chosen],
        [prompt for prompt, _ in asked],
        max_tokens=SAMPLE_TOKENS,
        batch_size=len(chosen),
        description="samples",
    )
    return [
        (example.image_id, prompt + wanted, prompt + " " + generation.text)
        for example, (prompt, wanted), generation in zip(chosen, asked, made, strict=True)
    ]


def _first_question(text: Text) -> tuple[str, str]:
    """Return what stands before the first learned segment, and that segment."""
    first = next(number for number, segment in enumerate(text) if segment.learned)
    return "".join(segment.text for segment in text[:first]), text[first].text
