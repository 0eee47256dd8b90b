"""What a stage trains: its parts, the plan of its steps, and their data made ahead."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from cache import FeatureStore
from train.data.examples import Example, Examples
from train.data.order import global_order, windowed_order
from train.data.prefetch import Ahead, ShardsAhead
from train.data.schedule import PlannedStep, num_rounds, plan_steps
from train.loop.step import StepData, build_step
from train.model.captioner import CaptionModel
from train.settings import LoopSettings


@dataclass(frozen=True, kw_only=True)
class Task:
    """The parts in which the two stages differ."""

    model: CaptionModel
    tokenizer: PreTrainedTokenizerBase
    store: FeatureStore
    train: Examples
    validation: Examples
    batch_size: int
    """Texts of an optimizer step."""
    optimizer: torch.optim.Optimizer
    seed: int
    settings: LoopSettings

    def plan(self) -> list[PlannedStep]:
        """Decide which texts make which optimizer step."""
        return plan_steps(
            self.train.num_texts,
            batch_size=self.batch_size,
            texts_per_image=self.settings.texts_per_image,
            epochs=self.settings.epochs,
            order=self._order(),
        )

    def _order(self) -> Callable[[int], NDArray[np.int64]]:
        if self.settings.order == "global":
            return lambda number: global_order(len(self.train), self.seed, number)
        shards = self.store.shards_of(self.train.image_ids)
        window = self.settings.window_shards
        return lambda number: windowed_order(shards, window, self.seed, number)

    def source(self, plan: Sequence[PlannedStep], done: int) -> Ahead[int, StepData]:
        """Make the data of the steps behind the first `done` ones, ahead of who uses them.

        Of a windowed order, the shards of the next window are read meanwhile.
        """
        steps = plan[done:]
        distance = 0
        if self.settings.order == "windowed":
            rounds = num_rounds(self.train.num_texts, self.settings.texts_per_image)
            windows = self.store.num_shards / self.settings.window_shards
            window_steps = len(plan) / (self.settings.epochs * rounds) / windows
            # Of a tiny part of an epoch, a window would be more steps than numbers go.
            distance = math.ceil(min(window_steps, len(plan)))
        image_ids = [self.train.image_ids[step.numbers] for step in steps]
        shards = ShardsAhead(self.store, image_ids, distance)

        def build(number: int) -> StepData:
            shards.before(number)
            return self.step_data(self._examples(steps[number]))

        return Ahead(build, range(len(steps)))

    def _examples(self, step: PlannedStep) -> list[Example]:
        whole = [self.train[number] for number in step.numbers.tolist()]
        return [Example(example.image_id, example.texts[step.texts]) for example in whole]

    def step_data(self, examples: Sequence[Example]) -> StepData:
        """Prepare some images and all their texts."""
        return build_step(
            examples,
            self.tokenizer,
            self.store,
            pass_tokens=self.settings.micro_batch_tokens,
            row_tokens=self.settings.row_tokens,
            max_text_tokens=self.settings.max_text_tokens,
            device=self.model.device,
        )
