"""Logs a run to wandb; offline by default, without account or network."""

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
    """One wandb run, finished on leaving the `with` block.

    `wandb sync .work/wandb/offline-run-*` uploads an offline run later. An error in wandb, like a
    full disk, is printed once and ends the logging, never the training.
    """

    def __init__(
        self, settings: TrackingSettings, run: RunDirectory, config: Mapping[str, Any]
    ) -> None:
        """Start logging, in the main process only.

        A resumed run keeps its id, so wandb shows it as one run.

        Raises:
            StageError: wandb is set to online and cannot connect.
        """
        WORK.mkdir(exist_ok=True)
        os.environ.setdefault("WANDB_SILENT", "true")
        self._stage, self._run = run.stage, None
        # On a full disk, Python prints a traceback for every line of wandb's log.
        logging.raiseExceptions = False
        run_id = run.tracking_id() if run.is_main else None
        with self._errors_end_logging():
            self._run = _start(settings, run, run_id, config)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of an optimizer step."""
        with self._errors_end_logging():
            if self._run:
                self._run.log(dict(values), step=step)

    def log_samples(self, step: int, rows: Sequence[tuple[int, str, str]]) -> None:
        """Log a table of image id, wanted text and generated text."""
        with self._errors_end_logging():
            if self._run:
                table = wandb.Table(
                    columns=["image_id", "wanted", "generated"], data=[list(r) for r in rows]
                )
                self._run.log({"samples": table}, step=step)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *exception: object) -> None:
        with self._errors_end_logging():
            if self._run:
                self._run.finish(exit_code=int(exception[0] is not None))

    @contextlib.contextmanager
    def _errors_end_logging(self) -> Iterator[None]:
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
