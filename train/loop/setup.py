"""The parts of a training run: model, data and optimizer, the plan of its steps, and their data."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from train.data.examples import Example, Examples
from train.data.order import global_order, windowed_order
from train.data.prefetch import Prefetcher, ShardReadahead, StoredFeatures
from train.data.prompts import PromptFormat
from train.data.schedule import PlannedStep, num_rounds, plan_steps
from train.loop.step import StepData, build_step
from train.model.captioner import CaptionModel
from train.settings import CPU_TOKENS, LoopSettings


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """The parts that differ between the two stages."""

    model: CaptionModel
    prompt_format: PromptFormat
    store: StoredFeatures
    train: Examples
    validation: Examples
    batch_size: int
    """Texts of an optimizer step."""
    optimizer: torch.optim.Optimizer
    seed: int
    settings: LoopSettings

    @property
    def pass_tokens(self) -> int:
        """Most positions of a forward pass; `train.loop.pass_size` finds those of a GPU."""
        tokens = self.settings.micro_batch_tokens
        return tokens if isinstance(tokens, int) else CPU_TOKENS

    @property
    def image_tokens(self) -> int:
        """Positions of an image's patches, pooled if the projector pools them."""
        return self.model.projector.num_embeddings(self.store.spec.patches)

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

    def prefetch(
        self, plan: Sequence[PlannedStep], completed_steps: int
    ) -> Prefetcher[int, StepData]:
        """Prepare the data of the remaining steps, ahead of their use.

        With a windowed order, the shards of the next window are read meanwhile.
        """
        steps = plan[completed_steps:]
        distance = 0
        if self.settings.order == "windowed":
            rounds = num_rounds(self.train.num_texts, self.settings.texts_per_image)
            windows = self.store.num_shards / self.settings.window_shards
            window_steps = len(plan) / (self.settings.epochs * rounds) / windows
            # A tiny share of an epoch gives a number of steps too large for ceil.
            distance = math.ceil(min(window_steps, len(plan)))
        image_ids = [self.train.image_ids[step.image_numbers] for step in steps]
        readahead = ShardReadahead(self.store, image_ids, distance)

        def build(number: int) -> StepData:
            readahead.advance_to(number)
            return self.step_data(self.examples_of(steps[number]))

        return Prefetcher(build, range(len(steps)))

    def examples_of(self, step: PlannedStep) -> list[Example]:
        """Return the images of a step, each with those of its texts that belong to the step."""
        whole = [self.train[number] for number in step.image_numbers.tolist()]
        return [Example(example.image_id, example.texts[step.texts]) for example in whole]

    def step_data(self, examples: Sequence[Example]) -> StepData:
        """Prepare the texts and features of some images."""
        return build_step(
            examples,
            self.prompt_format,
            self.store,
            pass_tokens=self.pass_tokens,
            row_tokens=None if self.model.packs_one_row else self.settings.row_tokens,
            max_text_tokens=self.settings.max_text_tokens,
            device=self.model.device,
            pool=self.model.projector.pool,
        )
