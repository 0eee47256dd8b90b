"""A run directory: built in the work directory, published whole when the run is finished.

Holds the projector, the adapter of stage 2, settings, metrics, history and provenance. A run that
is stopped is found again by what decides its numbers: settings, features, index, start weights.
"""

import contextlib
import csv
import hashlib
import importlib.metadata
import io
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from cache import FeatureStore
from cache.files.atomic import (
    canonical_json,
    path_in_errors,
    sha256_of,
    sync,
    write_json,
    write_text,
)
from cache.files.foreign import reading_foreign_file
from cache.store_index import INDEX_FILE
from workspace.clock import utc_now
from workspace.errors import StageError
from workspace.locks import folder_lock
from workspace.paths import CAPTIONS, CONVERSATIONS, FEATURES, RUNS, WORK
from workspace.settings import Params

UNFINISHED = WORK / "runs"
"""A folder a stage, in it one for each run that is not published yet."""
IDENTITY = "identity.json"
WEIGHTS = "weights_sha256"
"""Key of the provenance: the sha256 of each file of weights, by its path in the run's folder."""

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "safetensors", "numpy", "h5py")
"""Libraries whose version can change a run's numbers."""

FINISHED = "finished_utc"
"""In the provenance, when the run was published."""

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
    """The folder of one run while it is made. Of several processes, only the main one writes."""

    def __init__(
        self, stage: str, params: Params, identity: Mapping[str, Any], provenance: dict[str, Any]
    ) -> None:
        """Find or start the folder.

        Settings and provenance are written now: settings, code and tables may be others by the time
        that a long run ends.

        Args:
            stage: Its name.
            params: Settings.
            identity: All that decides the run's numbers: a value a name.
            provenance: What else is to be known of it.
        """
        self.stage = stage
        self.is_main = PartialState().is_main_process
        key = hashlib.sha256(canonical_json(identity)).hexdigest()[:12]
        self._folder = UNFINISHED / stage / key
        self.files = self._folder / "files"
        """What will be published."""
        self.checkpoints = self._folder / "checkpoints"
        self._provenance = provenance
        if not self.is_main:
            return
        if not self._folder.is_dir():
            _say_why_afresh(stage, self._folder.parent, identity)
        shutil.rmtree(self.files, ignore_errors=True)
        self.files.mkdir(parents=True)
        write_json(self._folder / IDENTITY, identity)
        write_text(self.files / "params.yaml", params.text)
        write_json(self.files / "provenance.json", provenance)

    def tracking_id(self) -> str:
        """Return a name for wandb: the same when the run is continued, another when run again."""
        path = self._folder / "tracking_id"
        if not path.exists():
            write_text(path, secrets.token_hex(4))
        with path_in_errors(path):
            return path.read_text()

    def continue_after(self, step: int, steps: int) -> None:
        """Note that the run goes on from a checkpoint."""
        if self.is_main:
            print(f"{self.stage}: going on after step {step} of {steps}", file=sys.stderr)
            self._provenance["continued_after_step"] = step
            write_json(self.files / "provenance.json", self._provenance)

    def write_history(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Write history.csv; a number that a step does not have is an empty cell."""
        if not self.is_main:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, HISTORY_COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.files / "history.csv", text.getvalue())

    def publish(self, metrics: dict[str, Any], report: Path) -> None:
        """Add metrics and the time, put the files in place of an older run's, write the report.

        The checkpoints go last: a kill at any moment before makes the next start publish again.
        """
        write_json(self.files / "metrics.json", metrics)
        finished = {FINISHED: utc_now(), WEIGHTS: weights_of(self.files)}
        write_json(self.files / "provenance.json", self._provenance | finished)
        for path in self.files.rglob("*"):
            # PEFT does not.
            sync(path)
        target, old = RUNS / self.stage, self._folder / "replaced"
        target.parent.mkdir(exist_ok=True)
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            # Moved before it is deleted: at no moment is half a run there.
            os.replace(target, old)
        os.replace(self.files, target)
        write_json(report, metrics)
        shutil.rmtree(self._folder)


def weights_of(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file of weights in a run's folder, by its path in there."""
    paths = sorted(folder.rglob("*.safetensors"))
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in paths}


@contextlib.contextmanager
def alone(stage: str) -> Iterator[None]:
    """Keep a stage's runs of this workspace for this command.

    Raises:
        StageError: Another command is at it.
    """
    guard = folder_lock(UNFINISHED / stage) if PartialState().is_main_process else None
    with guard or contextlib.nullcontext():
        yield


def _say_why_afresh(stage: str, folder: Path, identity: Mapping[str, Any]) -> None:
    """Name what keeps the latest unfinished run from being continued, if there is one."""
    stopped = [path.parent.parent for path in folder.glob("*/checkpoints/*.safetensors")]
    if not stopped:
        return
    latest = max(stopped, key=lambda path: path.stat().st_mtime)
    try:
        with reading_foreign_file(StageError):
            there = dict(json.loads((latest / IDENTITY).read_text()))
    except (OSError, StageError):
        # Nothing hangs on it but this sentence.
        there = {}
    differing = [
        f"{name} {there.get(name, 'not there')} there, {identity.get(name, 'not there')} here"
        for name in sorted(there.keys() | identity.keys())
        if there.get(name) != identity.get(name)
    ]
    why = "; ".join(differing)
    print(
        f"{stage}: starts afresh. The checkpoints in {latest} are of another run: "
        f"{why if why.isprintable() else ascii(why)}. They stay, for when those are back; delete "
        f"the folder if not.",
        file=sys.stderr,
    )


def identity(
    params: Params, sections: Iterable[str], store: FeatureStore, **others: str
) -> dict[str, Any]:
    """Return all that decides a run's numbers: settings under dotted names, and hashes.

    Args:
        params: Settings.
        sections: Those that count; the seed always does.
        store: Holds the features.
        others: Hashes of weights.
    """
    chosen = {name: params.values[name] for name in ("seed", *sections)}
    return {
        **dict(_flattened(chosen)),
        "features": store.fingerprint,
        "features_sha256": sha256_of(FEATURES / INDEX_FILE),
        **{f"{name}_sha256": digest for name, digest in index_hashes().items()},
        **others,
    }


def _flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def index_hashes() -> dict[str, str]:
    """Return the sha256 of the tables that hold the texts, by file name."""
    return {path.name: sha256_of(path) for path in (CAPTIONS, CONVERSATIONS)}


def provenance(store: FeatureStore, device: torch.device, **others: Any) -> dict[str, Any]:
    """Say from what a run was made: code, features, texts, weights, libraries, device.

    Args:
        store: Holds the features.
        device: Where it is trained.
        others: What else it started from, under the names of `train.provenance`.
    """
    return {
        "git_commit": git_commit(),
        "features_fingerprint": store.fingerprint,
        **others,
        "index_sha256": index_hashes(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "device": device_name(device),
        "processes": PartialState().num_processes,
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
    """Return this process's GPU, or the CPU."""
    # Of several processes on CPUs, accelerate forms a group only when told that it is CPUs.
    device: torch.device = PartialState(cpu=not torch.cuda.is_available()).device
    return device


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
