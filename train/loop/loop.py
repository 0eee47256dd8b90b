"""The training loop of both stages.

It resumes from the run's last checkpoint, if any, and ends with the same weights and history, bit
by bit, as an uninterrupted run: the order of the images, the learning rate and every random choice
are functions of the step.
"""

import contextlib
import math
import time
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from cache.files.foreign import reading_foreign_file
from cache.texts import first_few, one_line
from train.loop.checkpoint import Checkpoint, Checkpoints
from train.loop.history import History
from train.loop.interrupt import StopRequest
from train.loop.pass_size import with_pass_size
from train.loop.setup import TrainingSetup
from train.loop.step import StepData, optimizer_step
from train.loop.tracking import Tracker
from train.loop.validation import samples, validation_loss
from train.model.preflight import check_first_logits
from train.ranks import sum_of_ranks
from train.run import RunDirectory
from train.settings import CheckpointSettings
from workspace.errors import StageError

PASS_SIZE = "micro_batch_tokens"
"""Key of a checkpoint's progress and of the metrics: most positions of a forward pass."""

MAX_PASS_SIZE = 1 << 53
"""As large as a setting may be."""


def train(
    setup: TrainingSetup, saving: CheckpointSettings, run: RunDirectory, tracker: Tracker
) -> dict[str, Any]:
    """Train the parameters of the setup's optimizer, from the last checkpoint to the end.

    Returns:
        The run's metrics.

    Raises:
        StageError: Nothing to learn from, or a loss that is not finite; names step, images and the
            last checkpoint.
        KeyboardInterrupt: A signal asked to stop; the state is saved.
    """
    if not len(setup.train):
        raise StageError(
            f"{run.stage}: no text to learn from: no image of split train has features and a text. "
            f"Captions come from data.train.captions, conversations from data.instruct; "
            f"reports/index.json says how many of them were kept."
        )
    try:
        metrics = _Training(setup, saving, run, tracker).run()
    finally:
        if run.remote:
            run.remote.wait()
    if run.is_main:
        print(
            f"{run.stage}: {metrics['steps']} steps, loss {metrics['loss']:.3f}, "
            f"{metrics['seconds']:.0f} s"
        )
    return metrics


class _Training:
    """The state of a run between its steps."""

    def __init__(
        self, setup: TrainingSetup, saving: CheckpointSettings, run: RunDirectory, tracker: Tracker
    ) -> None:
        self._saving, self._run, self._tracker = saving, run, tracker
        self._setup, self._plan = setup, setup.plan()
        self._history = History(run, tracker)
        self._checkpoints = Checkpoints(run.checkpoints, saving.keep, run.remote)
        found = self._checkpoints.latest_for_all()
        self._completed_steps = self._restore(found) if found else 0
        stored = found.progress.get(PASS_SIZE) if found else None
        self._setup = with_pass_size(setup, run.stage, stored)
        self._saved_at = time.monotonic()
        self._schedule = _schedule(setup, len(self._plan), self._completed_steps)

    def run(self) -> dict[str, Any]:
        """Make the remaining steps and return the metrics."""
        setup, history = self._setup, self._history
        # Another thread reads, tokenises and packs the data of the next steps.
        prefetcher = setup.prefetch(self._plan, self._completed_steps)
        with StopRequest() as stop, self._progress_bar() as bar:
            if self._completed_steps:
                # Checkpoints are saved before the row of their step is written.
                self._log_and_validate(stop)
            for data in prefetcher:
                if not self._completed_steps:
                    check_first_logits(setup.model, data)
                loss_sum = self._step_unless(stop, data)
                learning_rate = float(self._schedule.get_last_lr()[0])
                self._schedule.step()
                self._completed_steps += 1
                history.add(
                    data,
                    loss_sum=loss_sum,
                    learning_rate=learning_rate,
                    waited=prefetcher.last_wait,
                )
                # Save before validating: an interrupted validation is repeated, not the step.
                stopping = _any_process(stop.requested)
                if stopping or self._save_is_due():
                    self._save(history.state())
                if stopping:
                    raise KeyboardInterrupt
                self._log_and_validate(stop)
                bar.set_postfix(history.latest(), refresh=False)
                bar.update()
        texts = setup.train.num_texts
        return history.summary() | {
            "images": len(texts),
            "texts": int(texts.sum()),
            "image_tokens": setup.image_tokens,
            PASS_SIZE: setup.pass_tokens,
        }

    def _step_unless(self, stop: StopRequest, data: StepData) -> float:
        """Make one optimizer step; what a signal breaks, like a compiler's process, is no error."""
        try:
            return self._step(data)
        except Exception:
            if stop.requested:
                raise KeyboardInterrupt from None
            raise

    def _step(self, data: StepData) -> float:
        """Make one optimizer step; return the summed loss of its tokens."""
        setup, step = self._setup, self._completed_steps + 1
        try:
            return optimizer_step(
                setup.model,
                setup.optimizer,
                data,
                clip_norm=setup.settings.clip_norm,
                seed=(setup.seed, step),
            )
        except FloatingPointError as error:
            names = first_few(data.image_ids)
            raise StageError(
                f"step {step}: {error}. Images of the step ({len(data.image_ids)}): {names}. "
                f"{self._last_checkpoint()} Lower the learning rate, or check the features with "
                f"`python -m cache.verify {setup.store.root}`."
            ) from None
        except torch.OutOfMemoryError as error:
            section = setup.settings.section
            raise StageError(
                f"step {step}: the GPU's memory is full: {one_line(error)} "
                f"{self._last_checkpoint()} Set {section}.gradient_checkpointing: true to go on "
                f"from it, or start again with {section}.micro_batch_tokens below "
                f"{setup.pass_tokens}."
            ) from None

    def _log_and_validate(self, stop: StopRequest) -> None:
        """Write a row of history if it is due; a resumed run repeats this for its first step.

        A signal interrupts a single process at once. Several processes must stop together, after
        a step.
        """
        settings, step = self._setup.settings, self._completed_steps
        before = self._history.state()
        single = PartialState().num_processes == 1
        try:
            with stop.at_once() if single else contextlib.nullcontext():
                if step == len(self._plan) or step % settings.validate_every_steps == 0:
                    self._history.write(step, self._validate())
                elif step % settings.log_every_steps == 0:
                    self._history.write(step, None)
        except (KeyboardInterrupt, torch.OutOfMemoryError):
            self._save(before)
            raise

    def _validate(self) -> float | None:
        loss = validation_loss(self._setup)
        if loss is not None and not math.isfinite(loss):
            # After the last step, no training loss would show it.
            raise StageError(
                f"step {self._completed_steps}: the validation loss is {loss}. "
                f"{self._last_checkpoint()} Lower the learning rate."
            )
        if self._run.is_main:
            self._tracker.log_samples(self._completed_steps, samples(self._setup))
        return loss

    def _save_is_due(self) -> bool:
        step, minutes = self._completed_steps, (time.monotonic() - self._saved_at) / 60
        return (
            step == len(self._plan)
            or step % self._saving.every_steps == 0
            or minutes >= self._saving.every_minutes
        )

    def _save(self, progress: dict[str, Any]) -> None:
        if not self._run.is_main:
            return
        parameters = self._setup.model.trainable_parameters()
        are_finite = [torch.isfinite(parameter).all() for parameter in parameters.values()]
        if not torch.stack(are_finite).all():
            raise StageError(
                f"step {self._completed_steps}: the weights are not finite any more. "
                f"{self._last_checkpoint()} Lower the learning rate."
            )
        progress = progress | {PASS_SIZE: self._setup.pass_tokens}
        self._checkpoints.save(self._completed_steps, parameters, self._setup.optimizer, progress)
        self._saved_at = time.monotonic()

    def _restore(self, found: Checkpoint) -> int:
        """Continue from a checkpoint; return the number of completed steps."""
        with reading_foreign_file(
            lambda why: StageError(
                f"{found.path}: is intact but belongs to another run ({why}). Delete it to go on "
                f"from the one before."
            )
        ):
            if found.step not in range(1, len(self._plan) + 1):
                raise ValueError(f"step {found.step!r} of {len(self._plan)}")
            pass_size = found.progress.get(PASS_SIZE, 1)
            if type(pass_size) is not int or not 0 < pass_size <= MAX_PASS_SIZE:
                raise ValueError(f"{PASS_SIZE} {pass_size!r}")
            found.restore(self._setup.model.trainable_parameters(), self._setup.optimizer)
            self._history.restore(found.progress)
        self._run.continue_after(found.step, len(self._plan))
        return found.step

    def _last_checkpoint(self) -> str:
        paths = self._checkpoints.paths
        return f"Last checkpoint: {paths[-1] if paths else 'none yet'}."

    def _progress_bar(self) -> "tqdm[Any]":
        return tqdm(
            total=len(self._plan),
            initial=self._completed_steps,
            desc=self._run.stage,
            unit="step",
            disable=None if self._run.is_main else True,
        )


def _schedule(
    setup: TrainingSetup, num_steps: int, completed_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the learning-rate schedule as it is after the completed steps."""
    for group in setup.optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    warmup = math.ceil(setup.settings.warmup_share * num_steps)
    schedule: torch.optim.lr_scheduler.LambdaLR = get_cosine_schedule_with_warmup(
        setup.optimizer, warmup, num_steps, last_epoch=completed_steps - 1
    )
    return schedule


def _any_process(requested: bool) -> bool:
    """Return whether any process was asked to stop, so that all stop after the same step."""
    if PartialState().num_processes == 1:
        return requested
    return bool(sum_of_ranks(torch.tensor(int(requested), device=PartialState().device)))
