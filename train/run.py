"""A run directory: built in the work directory, published whole when the run is finished.

It holds the projector, the adapter of stage 2, settings, metrics, history and provenance. An
interrupted run is found again by its identity: hashes of settings, features, texts and weights.
"""

import contextlib
import csv
import errno
import hashlib
import importlib.metadata
import io
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
from cache.store_index import INDEX_FILE
from train.ranks import check_restarts, check_same_inputs, naming_lost_ranks, num_restarts
from train.remote_run import RemoteRun
from train.settings import CONTROL, CheckpointSettings
from workspace.clock import utc_now
from workspace.code_hash import code_hash, modules_of
from workspace.errors import StageError
from workspace.json_files import flatten, read_json
from workspace.locks import folder_lock
from workspace.paths import CAPTIONS, CONVERSATIONS, FEATURES, RUNS, UNFINISHED_RUNS
from workspace.settings import Params

IDENTITY = "identity.json"
WEIGHTS = "weights_sha256"
"""Provenance key: the sha256 of each weights file, by its path in the run's folder."""

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "safetensors", "numpy", "h5py")
"""Libraries whose version can change a run's numbers."""

FINISHED = "finished_utc"
"""Provenance key: time of publication."""

RESTARTS = "restarts"
"""Provenance key: how often torchrun had restarted the processes, if at all."""

CONTROL_OF = "control_of"
"""Entry of the identity and of the provenance of a control: the stage whose texts it learned."""

UNTRAINED = "untrained"
"""Provenance key of a run without a step: the reason."""

NO_IDENTITY = (".gradient_checkpointing", "llm.prompt")
"""Ends of settings that are no part of a run's identity. Gradient checkpointing changes no bit, so
that a run that is out of memory may go on with it; the prompt format that a setting stands for is
an entry of its own."""

AS_IF_ABSENT = {"projector.pool": 1}
"""Settings, and the value with which one decides no more than if it were absent. Runs from before a
setting existed keep their identity."""

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
    """The folder of an unfinished run. Of several processes, only the main one writes."""

    def __init__(
        self, stage: str, params: Params, identity: Mapping[str, Any], provenance: dict[str, Any]
    ) -> None:
        """Find or create the folder.

        Settings and provenance are written now: settings, code and tables may have changed by the
        end of a long run.

        Args:
            stage: Its name.
            params: Settings.
            identity: See `run_identity`.
            provenance: See `provenance`.

        Raises:
            StageError: The processes of the run have different inputs.
        """
        _check_processes(identity, provenance)
        self.stage = stage
        self.is_main = PartialState().is_main_process
        key = hashlib.sha256(canonical_json(identity)).hexdigest()[:12]
        self._folder = UNFINISHED_RUNS / stage / key
        self.files = self._folder / "files"
        """The files to be published."""
        self.checkpoints = self._folder / "checkpoints"
        self._provenance = provenance
        self.remote: RemoteRun | None = None
        """The copy behind `checkpoints.to`, in the main process."""
        if not self.is_main:
            return
        saving = params.section("checkpoints", CheckpointSettings)
        outgoing = self._folder / "outgoing"
        shutil.rmtree(outgoing, ignore_errors=True)
        if saving.to:
            url = f"{saving.to.rstrip('/')}/{stage}/{key}"
            self.remote = RemoteRun(url, stage, saving.keep, outgoing)
        if number := provenance.get(RESTARTS):
            print(f"{stage}: restart {number} of all processes by torchrun", file=sys.stderr)
        if not self._folder.is_dir():
            _explain_fresh_start(stage, self._folder.parent, identity)
        shutil.rmtree(self.files, ignore_errors=True)
        self.files.mkdir(parents=True)
        write_json(self._folder / IDENTITY, identity)
        write_text(self.files / "params.yaml", params.text)
        write_json(self.files / "provenance.json", provenance)

    def tracking_id(self) -> str:
        """Return an id for wandb: the same when the run is resumed, another one when repeated."""
        path = self._folder / "tracking_id"
        if not path.exists():
            write_text(path, secrets.token_hex(4))
        with path_in_errors(path):
            return path.read_text()

    def continue_after(self, step: int, steps: int) -> None:
        """Record that the run resumes from a checkpoint."""
        if self.is_main:
            print(f"{self.stage}: going on after step {step} of {steps}", file=sys.stderr)
            self._provenance["continued_after_step"] = step
            write_json(self.files / "provenance.json", self._provenance)

    def write_history(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Write history.csv; a missing number is an empty cell."""
        if not self.is_main:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, HISTORY_COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.files / "history.csv", text.getvalue())

    def publish(self, metrics: dict[str, Any], report: Path) -> None:
        """Write metrics and report, replace an older run's files, and send the run to its URL.

        The checkpoints are deleted last: after a kill before that, the next start publishes again.

        Raises:
            StageError: The run is published here, but does not reach its URL.
        """
        write_json(self.files / "metrics.json", metrics)
        finished = {FINISHED: utc_now(), WEIGHTS: weights_of(self.files)}
        write_json(self.files / "provenance.json", self._provenance | finished)
        for path in self.files.rglob("*"):
            # PEFT does not sync.
            sync(path)
        target = RUNS / self.stage
        target.parent.mkdir(exist_ok=True)
        try:
            _exchange(self.files, target, self._folder / "replaced")
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            # `runs` lies on a disk of its own.
            staged, old = (target.with_name(f".{self.stage}.{n}") for n in ("partial", "replaced"))
            shutil.rmtree(staged, ignore_errors=True)
            shutil.copytree(self.files, staged)
            for path in staged.rglob("*"):
                sync(path)
            _exchange(staged, target, old)
            shutil.rmtree(old, ignore_errors=True)
        write_json(report, metrics)
        if self.remote:
            self.remote.send_run(target)
        shutil.rmtree(self._folder)


def _check_processes(identity: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
    """Refuse processes, on whichever machines, that would not compute the same run."""
    if PartialState().num_processes > 1:
        paths = sorted(modules_of(("train.stages.captions", "train.stages.conversations")))
        code = hashlib.sha256("".join(map(code_hash, paths)).encode()).hexdigest()
        check_same_inputs({**identity, "code": code, **provenance.get("versions", {})})


def _exchange(files: Path, target: Path, old: Path) -> None:
    """Put files in place of a run, which is moved away whole: half a run is never visible."""
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(files, target)


def weights_of(folder: Path) -> dict[str, str]:
    """Return the sha256 of each weights file in a run's folder, by its path in it."""
    paths = sorted(folder.rglob("*.safetensors"))
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in paths}


@contextlib.contextmanager
def stage_lock(stage: str) -> Iterator[None]:
    """Hold the stage's lock: one training command per stage and workspace.

    Raises:
        StageError: Another command holds it.
    """
    guard = folder_lock(UNFINISHED_RUNS / stage) if PartialState().is_main_process else None
    with guard or contextlib.nullcontext():
        yield


def _explain_fresh_start(stage: str, folder: Path, identity: Mapping[str, Any]) -> None:
    """Print how the latest unfinished run, if any, differs from this one."""
    unfinished = [path.parent.parent for path in folder.glob("*/checkpoints/*.safetensors")]
    if not unfinished:
        return
    latest = max(unfinished, key=lambda path: path.stat().st_mtime)
    try:
        other = read_json(latest / IDENTITY, StageError)
    except (OSError, StageError):
        # Only this message needs the file.
        other = {}
    why = "; ".join(
        f"{name} {other.get(name, 'none')} there, {identity.get(name, 'none')} here"
        for name in sorted(other.keys() | identity.keys())
        if other.get(name) != identity.get(name)
    )
    print(
        f"{stage}: starts afresh. The checkpoints in {latest} are of another run: "
        f"{why if why.isprintable() else ascii(why)}. They are kept in case you go back to it; "
        f"delete the folder if you do not.",
        file=sys.stderr,
    )


def run_identity(
    params: Params, sections: Iterable[str], store: FeatureStore, **others: str
) -> dict[str, Any]:
    """Return everything that decides a run's numbers: settings under dotted names, and hashes.

    Args:
        params: Settings.
        sections: The sections that matter; the seed always does.
        store: Holds the features.
        others: Hashes of weights.
    """
    settings = deciding_settings(params, ("seed", *sections))
    return {
        **{name: value for name, value in settings.items() if not name.endswith(NO_IDENTITY)},
        "features": store.fingerprint,
        "features_sha256": sha256_of(FEATURES / INDEX_FILE),
        **{f"{name}_sha256": digest for name, digest in index_hashes().items()},
        **others,
    }


def deciding_settings(params: Params, sections: Iterable[str]) -> dict[str, Any]:
    """Return the settings of some sections under dotted names, without those that are as absent."""
    settings = flatten({section: params.values.get(section) for section in sections})
    return {name: v for name, v in settings.items() if (name, v) not in AS_IF_ABSENT.items()}


def index_hashes() -> dict[str, str]:
    """Return the sha256 of the tables of texts, by file name."""
    return {path.name: sha256_of(path) for path in (CAPTIONS, CONVERSATIONS)}


def provenance(store: FeatureStore, device: torch.device, **others: Any) -> dict[str, Any]:
    """Return a run's origin: code, features, texts, weights, libraries and device.

    Args:
        store: Holds the features.
        device: Of the training.
        others: Further entries, under the names of `train.provenance`.
    """
    restarts = num_restarts()
    return {
        "git_commit": git_commit(),
        "features_fingerprint": store.fingerprint,
        **others,
        "index_sha256": index_hashes(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "device": device_name(device),
        "processes": PartialState().num_processes,
        **({RESTARTS: restarts} if restarts else {}),
    }


def control_of(name: str, stage: str) -> dict[str, str]:
    """Return what tells a control from the run of its stage: nothing if it is that run.

    Args:
        name: Of the run.
        stage: The stage whose texts it learns.
    """
    return {CONTROL_OF: stage} if name == CONTROL else {}


def git_commit() -> str:
    """Return the commit of this code, with "+changes" if files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + "+changes" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return "unknown: not a git checkout"


def pick_device() -> torch.device:
    """Return this process's GPU, or the CPU; several processes form their group now.

    Raises:
        StageError: Another process cannot be reached, or could not after a restart.
    """
    check_restarts()
    with naming_lost_ranks():
        # Without cpu=True, accelerate forms no group of several processes on CPUs.
        device: torch.device = PartialState(cpu=not torch.cuda.is_available()).device
    return device


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
