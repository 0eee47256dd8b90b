"""Reads the settings, metrics, provenance, scores and predictions that a place holds.

A place is a run directory, a workspace, the reports folder of a workspace, or a revision of this
repository: a commit, a tag, the name of a DVC experiment, or `workspace` for the checked-out files.
"""

import functools
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa

from cache.errors import SettingsError
from cache.files.atomic import check_ordinary, path_in_errors
from cache.files.foreign import reading_foreign_file
from cache.files.parquet import check_values, open_parquet
from cache.texts import one_line
from eval.bootstrap import Gain
from eval.scoring.gains import NUMBERS, parse_gain
from eval.scoring.score_names import BLIND, GAINS, MAIN_SCORES, as_number
from workspace.errors import StageError
from workspace.json_files import flatten
from workspace.paths import REPORTS, RUNS
from workspace.settings import parse_yaml

WORKSPACE = "workspace"
"""DVC's name for the checked-out files with their changes."""

COLUMNS = pa.schema(
    [
        ("model", pa.string()),
        ("kind", pa.string()),
        ("subset", pa.string()),
        ("image_id", pa.int64()),
        ("question", pa.string()),
        ("targets", pa.list_(pa.string())),
        ("prediction", pa.string()),
        ("score", pa.float64()),
    ]
)
"""The columns of predictions that are read. Tables of earlier versions have no subset."""

NO_SCORES = ("budget", "contamination", "split", "trained", "trained_on", "weights_sha256")
"""Sections of `eval.json` that say what was scored."""

PredictionRow = dict[str, Any]
"""One prediction, keyed as `COLUMNS`."""

Files = dict[str, dict[str, str]]
"""Part of a snapshot to its files: the beginning of dotted names to a path in the place."""

STAGES = ("pretrain", "finetune")
RUN_FILES: Files = {
    "settings": {"": "params.yaml"},
    "metrics": {"": "metrics.json"},
    "provenance": {"": "provenance.json"},
}
REPORTS_FILES: Files = {"scores": {"": "eval.json"}, "predictions": {"": "predictions.parquet"}}
WORKSPACE_FILES: Files = {
    "settings": {"": "params.yaml"},
    "metrics": {f"{stage}.": f"{RUNS}/{stage}/metrics.json" for stage in STAGES},
    "provenance": {f"{stage}.": f"{RUNS}/{stage}/provenance.json" for stage in STAGES},
    "scores": {"": f"{REPORTS}/eval.json"},
    "predictions": {"": f"{REPORTS}/predictions.parquet"},
}


@dataclass(frozen=True)
class Snapshot:
    """The content of a place; its dictionaries have dotted names, like `captions.blind.CIDEr`."""

    name: str
    """The name by which the user called the place."""
    files: Files
    read: Callable[[str], bytes]
    """Reads a file by its path in the place; a FileNotFoundError if it does not exist."""
    settings: dict[str, Any]
    metrics: dict[str, Any]
    """Metrics of the training."""
    provenance: dict[str, Any]
    scores: dict[str, Any]
    intervals: dict[str, tuple[float, float]]
    """Score to its 95 % interval, if it has one."""
    gains: dict[str, Gain]
    """Main score to its gain over the wrong image, if it was measured."""
    scored: dict[str, Any]
    """Hashes of the scored weights, trained stages, split, budget, contaminated images."""


def is_run_directory(name: str) -> bool:
    """Return whether a name is a folder with the files of one run."""
    if name == WORKSPACE:
        return False
    folder = Path(name)
    is_workspace = any((folder / path).exists() for path in (RUNS, REPORTS, "dvc.yaml"))
    return os.path.lexists(folder / "metrics.json") or (
        os.path.lexists(folder / "params.yaml") and not is_workspace
    )


def read_snapshot(name: str) -> Snapshot:
    """Read all of a place but its predictions.

    A folder takes precedence over a revision, except over `workspace`: this repository has a folder
    of that name. Files of a revision that DVC's cache lacks come from its default remote.

    Raises:
        SettingsError: The name is neither a folder with results nor a revision with a run.
        StageError: The run or the evaluation is not complete, or a file is damaged.
    """
    files = WORKSPACE_FILES
    if name == WORKSPACE or not Path(name).is_dir():
        read = _reader_of_revision(name)
    else:
        read = functools.partial(_read_in_folder, name)
        if is_run_directory(name):
            files = RUN_FILES
        elif os.path.lexists(Path(name) / "eval.json"):
            files = REPORTS_FILES
    settings, metrics, provenance, evaluated = (
        _read_all(name, read, files.get(part, {}))
        for part in ("settings", "metrics", "provenance", "scores")
    )
    if not (metrics or evaluated) or (files is RUN_FILES and not settings):
        _refuse_incomplete(name, files, settings)
    beside = {"intervals", GAINS}
    values = {key: v for key, v in evaluated.items() if beside.isdisjoint(key.split("."))}
    scores = {key: v for key, v in values.items() if not set(NO_SCORES) & set(key.split("."))}
    return Snapshot(
        name=name,
        files=files,
        read=read,
        settings=settings,
        metrics=metrics,
        provenance=provenance,
        scores=scores,
        intervals=_intervals(evaluated),
        gains=_main_gains(evaluated),
        scored={key: value for key, value in values.items() if key not in scores},
    )


def read_predictions(snapshot: Snapshot) -> list[PredictionRow]:
    """Read the predictions of a snapshot with scores.

    Returns:
        The rows in their order; subset is empty if the table has no such column.

    Raises:
        StageError: The table is missing or damaged.
        OSError: The system could not read it.
    """
    path = snapshot.files["predictions"][""]
    where = f"{snapshot.name}/{path}"
    try:
        content = snapshot.read(path)
    except (FileNotFoundError, StageError) as error:
        raise StageError(
            f"{where} cannot be read ({one_line(error)}). Try `dvc pull` or `dvc repro evaluate` "
            f"there, or for a revision `dvc fetch --all-commits {path}`."
        ) from None

    def refuse(why: str) -> StageError:
        return StageError(f"{where} is damaged, or no table of predictions: {why}")

    # A table is checked before it is parsed, which takes a file.
    with tempfile.NamedTemporaryFile() as copy:
        copy.write(content)
        copy.flush()
        with open_parquet(Path(copy.name), COLUMNS, refuse, optional=("subset",)) as file:
            table = file.read(columns=COLUMNS.names, use_threads=False)
    # A score may be null: the text was not scored.
    check_values(table.drop_columns(["score"]).columns, refuse)
    return [{"subset": "", **row} for row in table.to_pylist()]


def _read_in_folder(folder: str, path: str) -> bytes:
    check_ordinary(Path(folder) / path, functools.partial(_damaged, folder, path))
    with path_in_errors(Path(folder) / path):
        return (Path(folder) / path).read_bytes()


def _reader_of_revision(name: str) -> Callable[[str], bytes]:
    # Importing DVC takes a second or two.
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException, NotDvcRepoError
    from dvc.scm import SCMError

    revision = DVCFileSystem(rev=None if name == WORKSPACE else name)

    def read(path: str) -> bytes:
        try:
            content: bytes = revision.cat_file(path)
        except (SCMError, NotDvcRepoError) as error:
            raise SettingsError(
                f"{name} is neither a folder nor a revision or experiment here: {one_line(error)}."
            ) from None
        except DvcException as error:
            raise StageError(f"{name}: DVC cannot read {path}: {one_line(error)}") from None
        return content

    return read


def _refuse_incomplete(name: str, files: Files, settings: Mapping[str, Any]) -> NoReturn:
    if settings:
        wanted = [path for part in ("metrics", "scores") for path in files.get(part, {}).values()]
        raise StageError(
            f"{name} has no metrics: wanted {', '.join(wanted)}. Either the run did not finish, or "
            f"it was made elsewhere: try `dvc pull`. A revision has the runs of its "
            f"dvc.lock: commit that file after `dvc repro`."
        )
    found = "it has no params.yaml"
    if files is not RUN_FILES:
        found = "it has neither params.yaml nor reports/eval.json nor eval.json"
    raise SettingsError(
        f"{name} is no run and no evaluation: {found}. Wanted a workspace, its reports folder, a "
        f"run directory like runs/finetune, or a revision."
    )


def _read_all(name: str, read: Callable[[str], bytes], paths: Mapping[str, str]) -> dict[str, Any]:
    """Read the files that exist."""
    values: dict[str, Any] = {}
    for prefix, path in paths.items():
        try:
            content = read(path)
        except FileNotFoundError:
            continue
        with reading_foreign_file(functools.partial(_damaged, name, path)):
            text = content.decode()
            # JSON is YAML too, but for NaN.
            found = json.loads(text) if path.endswith(".json") else parse_yaml(text, path)
            if not isinstance(found, dict):
                raise ValueError(f"it is {type(found).__name__}, not keys.")
            values |= flatten(found, prefix)
    return values


def _damaged(name: str, path: str, why: str) -> StageError:
    return StageError(f"{name}: {path} is damaged: {why}")


def _intervals(flat: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    intervals = {}
    for name in flat:
        section, _, key = name.rpartition(".")
        low, high = (as_number(flat.get(f"{section}.intervals.{key}.{end}")) for end in (0, 1))
        if low is not None and high is not None:
            intervals[name] = (low, high)
    return intervals


def _main_gains(flat: Mapping[str, Any]) -> dict[str, Gain]:
    gains = {}
    for name in flat:
        section, _, key = name.rpartition(".")
        prefix = f"{section}.{GAINS}.{BLIND}.{key}"
        fields = {part: flat.get(f"{prefix}.{part}") for part in NUMBERS}
        interval = [flat.get(f"{prefix}.interval.{end}") for end in (0, 1)]
        gain = parse_gain({**fields, "interval": interval})
        if gain and key in MAIN_SCORES and not {"by_type", "pope_mean"} & set(section.split(".")):
            gains[name] = gain
    return gains
