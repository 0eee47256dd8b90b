"""The history of a run: counters between two logged steps, written as rows of history.csv."""

import resource
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from train.loop.step import StepData
from train.loop.tracking import Tracker
from train.run import RunDirectory


@dataclass
class _Counts:
    """Sums over some optimizer steps; checkpoints store them under these names."""

    loss_sum: float = 0.0
    learned: int = 0
    positions: int = 0
    slots: int = 0
    images: int = 0
    cut: int = 0
    wait: float = 0.0
    seconds: float = 0.0

    def add(self, other: "_Counts") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class History:
    """The rows of a run, and the counters since the last row."""

    def __init__(self, run: RunDirectory, tracker: Tracker) -> None:
        self._run, self._tracker = run, tracker
        self._rows: list[dict[str, float]] = []
        self._open, self._closed = _Counts(), _Counts()
        self._learning_rate = self._loss = 0.0
        self._clock = time.perf_counter()

    def _tick(self) -> float:
        now = time.perf_counter()
        passed, self._clock = now - self._clock, now
        return passed

    def add(self, data: StepData, *, loss_sum: float, learning_rate: float, waited: float) -> None:
        """Count one optimizer step.

        Args:
            data: Of the step.
            loss_sum: Cross entropy summed over the supervised tokens.
            learning_rate: Of the step.
            waited: Seconds spent waiting for the data.
        """
        self._learning_rate, self._loss = learning_rate, loss_sum / data.num_target_tokens
        self._open.add(
            _Counts(
                loss_sum=loss_sum,
                learned=data.num_target_tokens,
                positions=data.num_positions,
                slots=data.num_slots,
                images=len(data.image_ids),
                cut=data.num_cut,
                wait=waited,
                seconds=self._tick(),
            )
        )

    def latest(self) -> dict[str, str]:
        """Return the progress bar's texts: the last step's loss and the recent speed."""
        counts = self._open if self._open.seconds else self._closed
        return {
            "loss": f"{self._loss:.3f}",
            "tokens/s": f"{counts.positions / counts.seconds:,.0f}",
        }

    def write(self, step: int, validation_loss: float | None) -> None:
        """Close a row at an optimizer step, write the file and log to wandb."""
        counts = self._open
        row: dict[str, float] = {
            "step": step,
            "loss": round(counts.loss_sum / counts.learned, 6),
            "learning_rate": self._learning_rate,
            "tokens_per_second": round(counts.positions / counts.seconds, 1),
            "images_per_second": round(counts.images / counts.seconds, 4),
            "data_wait_share": round(counts.wait / counts.seconds, 4),
            "peak_memory_gib": round(peak_memory_gib(), 3),
        }
        if validation_loss is not None:
            row["validation_loss"] = round(validation_loss, 6)
        self._rows.append(row)
        # The time of validation counts for the run, not for the speed of this row.
        counts.seconds += self._tick()
        self._closed.add(counts)
        self._open = _Counts()
        self._run.write_history(self._rows)
        self._tracker.log(step, row)

    def state(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {
            "rows": list(self._rows),
            "open": asdict(self._open),
            "closed": asdict(self._closed),
            "learning_rate": self._learning_rate,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._rows = list(state["rows"])
        self._open, self._closed = _Counts(**state["open"]), _Counts(**state["closed"])
        self._learning_rate = state["learning_rate"]
        self._run.write_history(self._rows)
        self._tick()

    def summary(self) -> dict[str, float]:
        """Return the last losses, and the speed of the whole run.

        Without validation images there is no `validation_loss`.
        """
        total, last = self._closed, self._rows[-1]
        validation = {name: last[name] for name in ("validation_loss",) if name in last}
        return {
            "steps": last["step"],
            "loss": last["loss"],
            **validation,
            "texts_cut": total.cut,
            "seconds": round(total.seconds, 1),
            "tokens_per_second": round(total.positions / total.seconds, 1),
            "real_positions": round(total.positions / total.slots, 4),
            "data_wait_share": round(total.wait / total.seconds, 4),
            "peak_memory_gib": last["peak_memory_gib"],
        }


def peak_memory_gib() -> float:
    """Return the peak memory in GiB: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    # ru_maxrss counts KiB on Linux.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
