"""Sends a run's numbers to wandb: offline by default, nothing needs an account or a network."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import wandb

from cache.errors import PatchcacheError
from cache.files.foreign import describe
from train.run import RunDirectory
from train.settings import TrackingSettings
from workspace.errors import StageError
from workspace.paths import WORK


class Tracker:
    """One wandb run, finished on leaving the `with`.

    `wandb sync .work/wandb/offline-run-*` uploads an offline one later. Whatever wandb meets while
    it records, like a full disk, is said once and ends the recording, never the training.
    """

    def __init__(
        self, settings: TrackingSettings, run: RunDirectory, config: Mapping[str, Any]
    ) -> None:
        """Start recording; of several processes, only the main one does.

        A run that is continued has the same id, so that wandb shows it as one.

        Raises:
            StageError: wandb is to send the numbers and cannot.
        """
        WORK.mkdir(exist_ok=True)
        os.environ.setdefault("WANDB_SILENT", "true")
        self._stage, self._run = run.stage, None
        # On a full disk, Python would print a traceback for each line of wandb's log.
        logging.raiseExceptions = False
        run_id = run.tracking_id() if run.is_main else None
        with self._training_first():
            self._run = _start(settings, run, run_id, config)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers of an optimizer step."""
        with self._training_first():
            if self._run:
                self._run.log(dict(values), step=step)

    def log_samples(self, step: int, rows: Sequence[tuple[int, str, str]]) -> None:
        """Record a table of image id, wanted text and generated text."""
        with self._training_first():
            if self._run:
                table = wandb.Table(
                    columns=["image_id", "wanted", "generated"], data=[list(r) for r in rows]
                )
                self._run.log({"samples": table}, step=step)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *exception: object) -> None:
        with self._training_first():
            if self._run:
                self._run.finish(exit_code=int(exception[0] is not None))

    @contextlib.contextmanager
    def _training_first(self) -> Iterator[None]:
        try:
            yield
        except (PatchcacheError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            self._run = None
            print(
                f"{self._stage}: wandb records no more ({describe(error)}); training goes on",
                file=sys.stderr,
            )


def _start(
    settings: TrackingSettings, run: RunDirectory, run_id: str | None, config: Mapping[str, Any]
) -> Any:
    try:
        return wandb.init(
            project="patchcache",
            job_type=run.stage,
            dir=str(WORK),
            mode=settings.wandb if run.is_main else "disabled",
            id=run_id,
            resume="allow",
            config=dict(config),
        )
    except wandb.Error as error:
        if settings.wandb != "online":
            raise
        raise StageError(
            f"tracking.wandb: {error}. Log in with `wandb login`, or set it to offline."
        ) from None
