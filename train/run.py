"""A run directory: built in the work directory, published whole when the run is finished.

Holds the projector, the adapter of stage 2, settings, metrics, history and provenance.
"""

import csv
import importlib.metadata
import io
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from cache import FeatureStore
from cache.files import WORK, sha256_of, write_json, write_text
from cache.settings import Params
from train.data import CAPTIONS, CONVERSATIONS

RUNS = Path("runs")

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "safetensors", "numpy", "h5py")
"""Libraries whose version can change a run's numbers."""

HISTORY_COLUMNS = (
    "step",
    "loss",
    "validation_loss",
    "learning_rate",
    "tokens_per_second",
    "images_per_second",
    "data_wait_share",
    "peak_memory_gib",
)


class RunDirectory:
    """The folder of one run while it is made."""

    def __init__(self, stage: str, params: Params, provenance: dict[str, Any]) -> None:
        """Start the folder with what the run is made from.

        Written now: settings, code and tables may be others by the time that a long run ends.
        """
        self.stage = stage
        self.path = WORK / "runs" / stage
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        shutil.copyfile(params.path, self.path / "params.yaml")
        write_json(self.path / "provenance.json", provenance)

    def write_history(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Write history.csv; a number that a step does not have is an empty cell."""
        text = io.StringIO()
        writer = csv.DictWriter(text, HISTORY_COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path / "history.csv", text.getvalue())

    def publish(self, metrics: dict[str, Any]) -> None:
        """Add the metrics and move the folder to `runs/<stage>`, in place of an older run."""
        write_json(self.path / "metrics.json", metrics)
        target, old = RUNS / self.stage, self.path.with_suffix(".old")
        target.parent.mkdir(exist_ok=True)
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            # Moved before it is deleted: at no moment is half a run there.
            os.replace(target, old)
        os.replace(self.path, target)
        shutil.rmtree(old, ignore_errors=True)


def provenance(store: FeatureStore, device: torch.device) -> dict[str, Any]:
    """Say from what a run was made: code, features, texts, libraries, device."""
    return {
        "git_commit": git_commit(),
        "features_fingerprint": store.fingerprint,
        "index_sha256": {path.name: sha256_of(path) for path in (CAPTIONS, CONVERSATIONS)},
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "device": device_name(device),
    }


def git_commit() -> str:
    """Return the commit of this code, with "+changes" when files differ from it."""
    here = Path(__file__).parent
    try:
        commit = _git(here, "rev-parse", "HEAD")
        changed = _git(here, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown: not a git checkout"
    return commit + ("+changes" if changed else "")


def pick_device() -> torch.device:
    """Return the first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
