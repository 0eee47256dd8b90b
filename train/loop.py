"""The one training loop: both stages call it with other parts.

The loss of an optimizer step is the sum over its supervised tokens divided by their number, so
that it does not depend on how the step is cut into forward passes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

from cache import FeatureStore
from cache.errors import StageError
from cache.order import global_order, windowed_order
from train.batching import plan_steps
from train.data import Example
from train.generate import generate
from train.history import History
from train.model import CaptionModel
from train.prompts import Text
from train.run import RunDirectory
from train.settings import LoopSettings
from train.source import Ahead, ShardsAhead
from train.step import StepData, build_step, mean_loss
from train.tracking import Tracker

SAMPLE_TOKENS = 48
"""Most tokens of a text that is generated while training."""

NAMED_IMAGES = 8
"""How many image ids an error names."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """The parts in which the two stages differ."""

    model: CaptionModel
    tokenizer: PreTrainedTokenizerBase
    store: FeatureStore
    train: list[Example]
    validation: list[Example]
    batch_size: int
    """Texts of an optimizer step."""
    optimizer: torch.optim.Optimizer
    seed: int


def train(
    task: Task, settings: LoopSettings, run: RunDirectory, tracker: Tracker
) -> dict[str, Any]:
    """Train the parameters of the task's optimizer.

    Returns:
        The run's metrics.

    Raises:
        StageError: Nothing to learn from, or a loss that is not finite; names step and images.
    """
    if not task.train:
        raise StageError(f"{run.stage}: no text to learn from. Look at reports/index.json.")
    sizes = [len(example.texts) for example in task.train]
    steps = plan_steps(sizes, task.batch_size, settings.epochs, _order(task, settings))
    source = _step_source(task, settings, steps)
    warmup = math.ceil(settings.warmup_share * len(steps))
    schedule = get_cosine_schedule_with_warmup(task.optimizer, warmup, len(steps))
    history = History(run, tracker)
    torch.manual_seed(task.seed)
    with tqdm(total=len(steps), desc=run.stage, unit="step", disable=None) as bar:
        for step, data in enumerate(source, start=1):
            loss_sum = optimizer_step(task, data, settings.clip_norm, step)
            history.add(data, loss_sum=loss_sum, waited=source.last_wait)
            learning_rate = schedule.get_last_lr()[0]
            schedule.step()
            is_last = step == len(steps)
            if is_last or step % settings.validate_every_steps == 0:
                history.write(step, learning_rate, validation_loss(task, settings))
                tracker.log_samples(step, samples(task, settings))
            elif step % settings.log_every_steps == 0:
                history.write(step, learning_rate, None)
            bar.set_postfix(loss=f"{loss_sum / data.num_learned:.3f}", refresh=False)
            bar.update()
    metrics = history.summary() | {"images": len(task.train), "texts": sum(sizes)}
    print(
        f"{run.stage}: {len(steps)} steps, loss {metrics['loss']:.3f}, {metrics['seconds']:.0f} s"
    )
    return metrics


def optimizer_step(task: Task, data: StepData, clip_norm: float, step: int) -> float:
    """Make one optimizer step over all its forward passes.

    Returns:
        Cross entropy summed over the supervised tokens.

    Raises:
        StageError: It or its gradient is not finite; the weights are as before.
    """
    task.model.train()
    task.optimizer.zero_grad(set_to_none=True)
    loss_sum = 0.0
    for patches_RPD, batch in data.parts:
        loss = task.model(patches_RPD, batch.to(task.model.device))
        (loss / data.num_learned).backward()
        loss_sum += loss.item()
    parameters = [p for group in task.optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, clip_norm).item()
    if not (math.isfinite(loss_sum) and math.isfinite(norm)):
        names = ", ".join(map(str, data.image_ids[:NAMED_IMAGES]))
        raise StageError(
            f"step {step}: the loss is {loss_sum}, its gradient's norm {norm}. Images of the step "
            f"({len(data.image_ids)}): {names}{', ...' * (len(data.image_ids) > NAMED_IMAGES)}. "
            f"Lower the learning rate, or check their features with FeatureStore.verify()."
        )
    task.optimizer.step()
    return loss_sum


def validation_loss(task: Task, settings: LoopSettings) -> float | None:
    """Return the mean loss of a supervised token over the first validation images.

    Raises:
        StageError: It is not finite.
    """
    examples = task.validation[: settings.validation_images]
    if not examples:
        return None
    loss = mean_loss(task.model, _step_data(task, settings, examples))
    if not math.isfinite(loss):
        # The last step may have done it, after which no training loss would tell.
        raise StageError(f"the validation loss is {loss}. Lower the learning rate.")
    return loss


def samples(task: Task, settings: LoopSettings) -> list[tuple[int, str, str]]:
    """Generate a text for a few validation images: image id, wanted, generated."""
    chosen = task.validation[: settings.samples]
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


def _order(task: Task, settings: LoopSettings) -> Callable[[int], NDArray[np.int64]]:
    """Return the order of the examples as a function of the epoch."""
    if settings.order == "global":
        return lambda epoch: global_order(len(task.train), task.seed, epoch)
    shards = task.store.shards_of([example.image_id for example in task.train])
    return lambda epoch: windowed_order(shards, settings.window_shards, task.seed, epoch)


def _step_source(
    task: Task, settings: LoopSettings, steps: list[list[int]]
) -> Ahead[int, StepData]:
    """Make the steps' data ahead; of a windowed order, bring in the next window's shards too."""
    examples = [[task.train[number] for number in numbers] for numbers in steps]
    distance = 0
    if settings.order == "windowed":
        windows = task.store.num_shards / settings.window_shards
        distance = math.ceil(len(steps) / settings.epochs / windows)
    image_ids = [np.array([example.image_id for example in step]) for step in examples]
    shards = ShardsAhead(task.store, image_ids, distance)

    def build(number: int) -> StepData:
        shards.before(number)
        return _step_data(task, settings, examples[number])

    return Ahead(build, range(len(steps)))


def _step_data(task: Task, settings: LoopSettings, examples: Sequence[Example]) -> StepData:
    return build_step(
        examples,
        task.tokenizer,
        task.store,
        max_tokens=settings.micro_batch_tokens,
        max_text_tokens=settings.max_text_tokens,
        device=task.model.device,
    )
