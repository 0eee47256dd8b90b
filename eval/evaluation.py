"""Reads what the evaluate stage has written: in a folder, or in a revision of this repository."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from cache.errors import SettingsError
from cache.files.foreign import reading_foreign_file
from cache.files.parquet import check_values, open_parquet
from cache.texts import one_line
from train.compare import REVISION_METRICS, WORKSPACE, flatten, read_revision
from workspace.errors import StageError
from workspace.paths import REPORTS

SCORES, PREDICTIONS = "eval.json", "predictions.parquet"

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
"""What is read of the predictions."""

SCORE = "score"

LATER = "subset"
"""Column that evaluations did not always have, when none had subsets."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """Scores and predictions."""

    name: str
    """As it was called."""
    scores: dict[str, Any]
    """By dotted names, like `captions.CIDEr` and `captions.intervals.CIDEr.0`."""
    predictions: list[Row]
    """What each text was about, what it says and how it scored: keys as in `COLUMNS`."""


def read_evaluation(name: str) -> Evaluation:
    """Read an evaluation.

    Args:
        name: A workspace, its reports folder, or a revision or experiment as
            `train.compare.read_revision` knows it; a folder comes first.

    Raises:
        SettingsError: It is none of these.
        StageError: It has no evaluation, or a file of it is damaged.
    """
    return _from_folder(name) if Path(name).is_dir() else _from_revision(name)


def _from_folder(name: str) -> Evaluation:
    places = [Path(name) / REPORTS, Path(name)]
    folder = next((place for place in places if (place / SCORES).is_file()), None)
    if folder is None:
        raise SettingsError(
            f"{name} has no evaluation: neither {REPORTS}/{SCORES} nor {SCORES} is in it. Run "
            f"`dvc repro evaluate` there, or name another folder."
        )
    path = folder / PREDICTIONS
    if not path.exists():
        raise StageError(f"{path} is missing: try `dvc pull`, or `dvc repro evaluate`.")
    return Evaluation(name, _read_scores(folder / SCORES), read_predictions(path, str(path)))


def _read_scores(path: Path) -> dict[str, Any]:
    with reading_foreign_file(lambda why: StageError(f"{path} is damaged: {why}"), path):
        scores = json.loads(path.read_bytes())
        if not isinstance(scores, dict):
            raise ValueError(f"it is {type(scores).__name__}, not keys.")
        return flatten(scores)


def _from_revision(name: str) -> Evaluation:
    # Refuses with the right words what is no revision.
    metrics = read_revision(name).metrics
    of_stages = tuple(prefix for prefix in REVISION_METRICS if prefix)
    scores = {key: value for key, value in metrics.items() if not key.startswith(of_stages)}
    if not scores:
        raise StageError(f"{name} has no {REPORTS}/{SCORES}: evaluate was not run there.")
    # Importing DVC takes a second or two.
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException

    path = f"{REPORTS}/{PREDICTIONS}"
    files = DVCFileSystem(rev=None if name == WORKSPACE else name)
    try:
        content = files.cat_file(path)
    except (DvcException, FileNotFoundError) as error:
        raise StageError(
            f"{name}: {path} cannot be read ({one_line(error)}). Try "
            f"`dvc fetch --all-commits {path}`, or name the folder of a workspace."
        ) from None
    # What is looked at before it is believed must lie in a file.
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        return Evaluation(name, scores, read_predictions(Path(file.name), f"{name}: {path}"))


def read_predictions(path: Path, where: str) -> list[Row]:
    """Read a table of predictions.

    Args:
        path: The file.
        where: What it is called, for the error text.

    Returns:
        Its rows, in their order; without subsets in the file, subset is empty.

    Raises:
        StageError: It is no such table.
        OSError: The system could not read it.
    """

    def refuse(why: str) -> StageError:
        return StageError(f"{where} is damaged, or no table of predictions: {why}")

    with open_parquet(path, COLUMNS, refuse, optional=(LATER,)) as file:
        table = file.read(columns=COLUMNS.names, use_threads=False)
        # A text that was not scored has no score.
        check_values(table.drop_columns([SCORE]).columns, refuse)
        rows: list[Row] = table.to_pylist()
    return [{LATER: "", **row} for row in rows]
