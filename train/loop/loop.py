"""The one training loop: both stages call it with other parts.

It goes on from the run's last checkpoint where there is one, and ends with the same weights and the
same history, bit by bit, as if it had never been stopped. The order of the images, the learning
rate and every random choice are functions of the step.
"""

import contextlib
import math
import time
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from cache.files.foreign import reading_foreign_file
from cache.texts import first_few
from train.loop.checkpoint import Checkpoints
from train.loop.history import History
from train.loop.interrupt import StopRequest
from train.loop.setup import Task
from train.loop.step import StepData, optimizer_step
from train.loop.tracking import Tracker
from train.loop.validation import samples, validation_loss
from train.model.preflight import check_first_logits
from train.run import RunDirectory
from train.settings import CheckpointSettings
from workspace.errors import StageError


def train(
    task: Task, saving: CheckpointSettings, run: RunDirectory, tracker: Tracker
) -> dict[str, Any]:
    """Train the parameters of the task's optimizer, from the last checkpoint to the end.

    Returns:
        The run's metrics.

    Raises:
        StageError: Nothing to learn from, or a loss that is not finite; names step, images and the
            last checkpoint.
        KeyboardInterrupt: A signal asked to stop; the state is saved.
    """
    if not len(task.train):
        raise StageError(
            f"{run.stage}: no text to learn from: no image of split train has features and a text. "
            f"Captions come from data.train.captions, conversations from data.instruct; "
            f"reports/index.json says how many of them were kept."
        )
    metrics = _Training(task, saving, run, tracker).to_the_end()
    if run.is_main:
        print(
            f"{run.stage}: {metrics['steps']} steps, loss {metrics['loss']:.3f}, "
            f"{metrics['seconds']:.0f} s"
        )
    return metrics


class _Training:
    """The state of a run between its steps."""

    def __init__(
        self, task: Task, saving: CheckpointSettings, run: RunDirectory, tracker: Tracker
    ) -> None:
        self._task, self._saving, self._run, self._tracker = task, saving, run, tracker
        self._steps = task.plan()
        self._history = History(run, tracker)
        self._checkpoints = Checkpoints(run.checkpoints, saving.keep)
        self._done = self._restored()
        self._saved_at = time.monotonic()
        self._schedule = _schedule(task, len(self._steps), self._done)

    def _restored(self) -> int:
        """Go back to the last checkpoint; return the number of steps that were made."""
        found = self._checkpoints.latest()
        # Nobody writes a checkpoint before everybody has read this one.
        PartialState().wait_for_everyone()
        if found is None:
            return 0
        with reading_foreign_file(
            lambda why: StageError(
                f"{found.path}: is not of this run, though whole ({why}). Delete it to go on from "
                f"the one before."
            )
        ):
            if found.step not in range(1, len(self._steps) + 1):
                raise ValueError(f"step {found.step!r} of {len(self._steps)}")
            found.restore(self._task.model.learning(), self._task.optimizer)
            self._history.restore(found.progress)
        self._run.continue_after(found.step, len(self._steps))
        return found.step

    def to_the_end(self) -> dict[str, Any]:
        """Make the steps that are left; return the metrics."""
        source = self._task.source(self._steps, self._done)
        with StopRequest() as stop, self._bar() as bar:
            if self._done:
                self._record(self._done, stop)
            for step, data in enumerate(source, start=self._done + 1):
                if step == 1:
                    check_first_logits(self._task.model, data)
                self._make(step, data, source.last_wait)
                asked = _any_process(stop.asked)
                if asked or self._save_is_due(step):
                    self._save(step, self._history.state())
                if asked:
                    raise KeyboardInterrupt
                self._record(step, stop)
                bar.set_postfix(self._history.latest(), refresh=False)
                bar.update()
        texts = self._task.train.num_texts
        return self._history.summary() | {"images": len(texts), "texts": int(texts.sum())}

    def _bar(self) -> "tqdm[Any]":
        return tqdm(
            total=len(self._steps),
            initial=self._done,
            desc=self._run.stage,
            unit="step",
            disable=None if self._run.is_main else True,
        )

    def _make(self, step: int, data: StepData, waited: float) -> None:
        """Make one optimizer step and count it."""
        task = self._task
        try:
            loss_sum = optimizer_step(
                task.model,
                task.optimizer,
                data,
                clip_norm=task.settings.clip_norm,
                seed=(task.seed, step),
            )
        except FloatingPointError as error:
            names = first_few(data.image_ids)
            raise StageError(
                f"step {step}: {error}. Images of the step ({len(data.image_ids)}): {names}. "
                f"{self._last_checkpoint()} Lower the learning rate, or check the features with "
                f"`python -m cache.verify {task.store.root}`."
            ) from None
        learning_rate = float(self._schedule.get_last_lr()[0])
        self._schedule.step()
        self._history.add(data, loss_sum=loss_sum, learning_rate=learning_rate, waited=waited)

    def _save_is_due(self, step: int) -> bool:
        minutes = (time.monotonic() - self._saved_at) / 60
        return (
            step == len(self._steps)
            or step % self._saving.every_steps == 0
            or minutes >= self._saving.every_minutes
        )

    def _save(self, step: int, progress: dict[str, Any]) -> None:
        if not self._run.is_main:
            return
        learning = self._task.model.learning()
        if not all(torch.isfinite(parameter).all() for parameter in learning.values()):
            raise StageError(
                f"step {step}: the weights are not finite any more. {self._last_checkpoint()} "
                f"Lower the learning rate."
            )
        self._checkpoints.save(step, learning, self._task.optimizer, progress)
        self._saved_at = time.monotonic()

    def _last_checkpoint(self) -> str:
        paths = self._checkpoints.paths
        return f"Last checkpoint: {paths[-1] if paths else 'none yet'}."

    def _record(self, step: int, stop: StopRequest) -> None:
        """Write a row of history where one is due; a run that is continued here does it again.

        A single process is stopped in it at once; several must stop together, after a step.
        """
        before = self._history.state()
        alone = PartialState().num_processes == 1
        try:
            with stop.at_once() if alone else contextlib.nullcontext():
                if step == len(self._steps) or step % self._task.settings.validate_every_steps == 0:
                    self._history.write(step, self._validate(step))
                elif step % self._task.settings.log_every_steps == 0:
                    self._history.write(step, None)
        except KeyboardInterrupt:
            self._save(step, before)
            raise

    def _validate(self, step: int) -> float | None:
        loss = validation_loss(self._task)
        if loss is not None and not math.isfinite(loss):
            # The last step may have done it, after which no training loss would tell.
            raise StageError(
                f"step {step}: the validation loss is {loss}. {self._last_checkpoint()} "
                f"Lower the learning rate."
            )
        if self._run.is_main:
            self._tracker.log_samples(step, samples(self._task))
        return loss


def _schedule(task: Task, steps: int, done: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the schedule of the learning rates as it is after some steps."""
    for group in task.optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    warmup = math.ceil(task.settings.warmup_share * steps)
    schedule: torch.optim.lr_scheduler.LambdaLR = get_cosine_schedule_with_warmup(
        task.optimizer, warmup, steps, last_epoch=done - 1
    )
    return schedule


def _any_process(asked: bool) -> bool:
    """Say whether any process was asked, so that all stop after the same step."""
    if PartialState().num_processes == 1:
        return asked
    return bool(reduce(torch.tensor(int(asked), device=PartialState().device), "sum"))
