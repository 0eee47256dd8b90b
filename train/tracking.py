"""Sends a run's numbers to wandb: offline by default, nothing needs an account or a network."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import wandb

from cache.errors import StageError
from cache.files import WORK
from train.run import RunDirectory
from train.settings import TrackingSettings


class Tracker:
    """One wandb run, finished on leaving the `with`.

    `wandb sync .work/wandb/offline-run-*` uploads an offline one later.
    """

    def __init__(
        self, settings: TrackingSettings, run: RunDirectory, config: Mapping[str, Any]
    ) -> None:
        """Start recording; of several processes, only the main one does.

        A run that is continued has the same id, so that wandb shows it as one.
        """
        WORK.mkdir(exist_ok=True)
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            self._run = wandb.init(
                project="patchcache",
                job_type=run.stage,
                dir=str(WORK),
                mode=settings.wandb if run.is_main else "disabled",
                id=run.tracking_id() if run.is_main else None,
                resume="allow",
                config=dict(config),
            )
        except wandb.Error as error:
            raise StageError(
                f"tracking.wandb: {error}. Log in with `wandb login`, or set it to offline."
            ) from None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers of an optimizer step."""
        self._run.log(dict(values), step=step)

    def log_samples(self, step: int, rows: Sequence[tuple[int, str, str]]) -> None:
        """Record a table of image id, wanted text and generated text."""
        table = wandb.Table(
            columns=["image_id", "wanted", "generated"], data=[list(r) for r in rows]
        )
        self._run.log({"samples": table}, step=step)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *exception: object) -> None:
        self._run.finish(exit_code=int(exception[0] is not None))
