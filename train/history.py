"""Counts what a run does between two logged steps, and writes it as rows of history.csv."""

import resource
import time

import torch

from train.run import RunDirectory
from train.step import StepData
from train.tracking import Tracker


class History:
    """The rows of one run, and the counters since the last row."""

    def __init__(self, run: RunDirectory, tracker: Tracker) -> None:
        self._run, self._tracker = run, tracker
        self._rows: list[dict[str, float]] = []
        self._started = time.perf_counter()
        self._total_positions = self._total_cut = 0
        self._total_wait = 0.0
        self._reset()

    def _reset(self) -> None:
        self._since = time.perf_counter()
        self._loss_sum = self._wait = 0.0
        self._learned = self._positions = self._images = 0

    def add(self, data: StepData, *, loss_sum: float, waited: float) -> None:
        """Count one optimizer step.

        Args:
            data: What it learned from.
            loss_sum: Cross entropy summed over the supervised tokens.
            waited: Seconds in which there was no data to work on.
        """
        self._loss_sum += loss_sum
        self._learned += data.num_learned
        self._positions += data.num_positions
        self._images += len(data.image_ids)
        self._total_cut += data.num_cut
        self._wait += waited

    def write(self, step: int, learning_rate: float, validation_loss: float | None) -> None:
        """Close a row at an optimizer step, write the file, tell wandb."""
        elapsed = time.perf_counter() - self._since
        row: dict[str, float] = {
            "step": step,
            "loss": round(self._loss_sum / self._learned, 6),
            "learning_rate": learning_rate,
            "tokens_per_second": round(self._positions / elapsed, 1),
            "images_per_second": round(self._images / elapsed, 2),
            "data_wait_share": round(self._wait / elapsed, 4),
            "peak_memory_gib": round(peak_memory_gib(), 3),
        }
        if validation_loss is not None:
            row["validation_loss"] = round(validation_loss, 6)
        self._rows.append(row)
        self._run.write_history(self._rows)
        self._tracker.log(step, row)
        self._total_positions += self._positions
        self._total_wait += self._wait
        self._reset()

    def summary(self) -> dict[str, float]:
        """Return the last losses, and speed and waiting over the whole run.

        Without `validation_loss` where nothing was there to validate on.
        """
        seconds = time.perf_counter() - self._started
        last = self._rows[-1]
        validation = {name: last[name] for name in ("validation_loss",) if name in last}
        return {
            "steps": last["step"],
            "loss": last["loss"],
            **validation,
            "texts_cut": self._total_cut,
            "seconds": round(seconds, 1),
            "tokens_per_second": round(self._total_positions / seconds, 1),
            "data_wait_share": round(self._total_wait / seconds, 4),
            "peak_memory_gib": last["peak_memory_gib"],
        }


def peak_memory_gib() -> float:
    """Return the most memory that was used: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    # ru_maxrss counts KiB on Linux.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
