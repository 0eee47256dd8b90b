"""Command: says in what two runs differ: settings, scores, and what they were made from.

python -m train.compare runs/finetune copies/finetune
python -m train.compare workspace lucid-wave

A run is a run directory, or a revision of this repository: a commit, a tag or the name of a DVC
experiment, of which both stages and the evaluation are compared. `workspace` is what lies here.
The difference is the second minus the first.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.cli.command import command_parser, run_guarded
from cache.errors import SettingsError
from cache.files.atomic import check_ordinary, path_in_errors
from cache.files.foreign import reading_foreign_file
from cache.texts import one_line
from workspace.errors import StageError
from workspace.settings import parse_yaml

FOLDER_METRICS = {"": "metrics.json"}
FOLDER_PROVENANCE = {"": "provenance.json"}
"""What the names in the table begin with, to file of a run directory."""

REVISION_METRICS = {
    "pretrain.": "runs/pretrain/metrics.json",
    "finetune.": "runs/finetune/metrics.json",
    "": "reports/eval.json",
}
REVISION_PROVENANCE = {
    "pretrain.": "runs/pretrain/provenance.json",
    "finetune.": "runs/finetune/provenance.json",
}
"""The same of a revision."""

WORKSPACE = "workspace"
"""DVC's name for what is checked out, with its changes."""

ABSENT = object()
"""What a run has under a name that only the other one knows."""

LONG_HASH = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{28,}\b")


@dataclass(frozen=True)
class Run:
    """What a run was told, what it scored and what it was made from, under dotted names."""

    settings: dict[str, Any]
    metrics: dict[str, Any]
    provenance: dict[str, Any]


def compare(left: str, right: str) -> None:
    """Print what differs between two runs: run directories or revisions.

    Raises:
        SettingsError: One of them is no run, or only one is a folder.
        StageError: One of them has no metrics, or its files are damaged.
    """
    folders = [name for name in (left, right) if Path(name).is_dir()]
    if len(folders) == 1:
        raise SettingsError(
            f"{right if left in folders else left} is no folder, and {folders[0]} is one. Wanted "
            f"two run directories, or two revisions."
        )
    read = read_folder if folders else read_revision
    one, other = read(left), read(right)
    rows = [("", left, right, "second - first")]
    rows += section("settings", "settings", one.settings, other.settings)
    rows += section("metrics", "metrics", one.metrics, other.metrics, difference=True)
    rows += section("provenance", "other facts", one.provenance, other.provenance)
    print_table(rows)


def read_folder(name: str) -> Run:
    """Read a run directory.

    Raises:
        SettingsError: It is none.
        StageError: It has no metrics, or a file of it is damaged.
    """
    folder = Path(name)
    return _read_run(
        name, lambda path: (folder / path).read_bytes(), FOLDER_METRICS, FOLDER_PROVENANCE
    )


def read_revision(name: str) -> Run:
    """Read both stages and the evaluation as a revision of the repository has them.

    What DVC's cache lacks comes from its default remote.

    Raises:
        SettingsError: No such revision, no run in it, or no repository here.
        StageError: It has no metrics, or a file of it is damaged.
    """
    # Importing DVC takes a second or two.
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException, NotDvcRepoError
    from dvc.scm import SCMError

    files = DVCFileSystem(rev=None if name == WORKSPACE else name)
    try:
        return _read_run(name, files.cat_file, REVISION_METRICS, REVISION_PROVENANCE)
    except (SCMError, NotDvcRepoError) as error:
        raise SettingsError(
            f"{name} is neither a folder nor a revision or experiment here: {one_line(error)}."
        ) from None
    except DvcException as error:
        raise StageError(f"{name}: DVC cannot read it: {one_line(error)}") from None


def _read_run(
    name: str,
    read: Callable[[str], bytes],
    metrics: Mapping[str, str],
    provenance: Mapping[str, str],
) -> Run:
    settings = _read_all(name, read, {"": "params.yaml"})
    if not settings:
        raise SettingsError(
            f"{name} is no run: it has no params.yaml. Wanted a folder like runs/finetune, or a "
            f"revision."
        )
    run = Run(settings, _read_all(name, read, metrics), _read_all(name, read, provenance))
    if not run.metrics:
        raise StageError(
            f"{name} has no metrics: wanted {', '.join(metrics.values())}. Either the run did not "
            f"finish, or it was made elsewhere: try `dvc pull`."
        )
    return run


def _read_all(name: str, read: Callable[[str], bytes], paths: Mapping[str, str]) -> dict[str, Any]:
    """Read those of some files that are there."""
    found: dict[str, Any] = {}
    for prefix, path in paths.items():
        try:
            # Of a folder; a revision's files are not on the disk.
            check_ordinary(Path(name) / path, functools.partial(_damaged, name, path))
            with path_in_errors(Path(name) / path):
                content = read(path)
        except FileNotFoundError:
            continue
        with reading_foreign_file(functools.partial(_damaged, name, path)):
            text = content.decode()
            # JSON is YAML too, but for NaN.
            values = json.loads(text) if path.endswith(".json") else parse_yaml(text, path)
            if not isinstance(values, dict):
                raise ValueError(f"it is {type(values).__name__}, not keys.")
            found |= flatten(values, prefix)
    return found


def _damaged(name: str, path: str, why: str) -> StageError:
    return StageError(f"{name}: {path} is damaged: {why}")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Give everything below some keys a dotted name.

    Args:
        values: Dictionaries and lists in each other, as JSON has them.
        prefix: What each name begins with.

    Returns:
        Names like `lora.r` and `files.0.url` to what is neither dictionary nor list, or is empty;
        in the same order.
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list):
            value = dict(enumerate(value)) or value
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def section(
    title: str,
    noun: str,
    left: Mapping[str, Any],
    right: Mapping[str, Any],
    *,
    difference: bool = False,
) -> list[tuple[str, str, str, str]]:
    """Make the lines of one part of the table: what differs, and how many do not."""
    names = list(left) + [name for name in right if name not in left]
    pairs = {name: (left.get(name, ABSENT), right.get(name, ABSENT)) for name in names}
    differing = {name: pair for name, pair in pairs.items() if not _same(*pair)}
    rows = [
        (f"  {_text(name)}", _text(one), _text(other), _difference(one, other) * difference)
        for name, (one, other) in differing.items()
    ]
    equal = (f"  {len(names) - len(rows)} {noun} equal", "", "", "")
    return [(title, "", "", ""), *rows, equal]


def _same(one: Any, other: Any) -> bool:
    # NaN differs from itself.
    return bool(one == other or (one != one and other != other))


def _difference(one: Any, other: Any) -> str:
    before, after = as_number(one), as_number(other)
    return "" if before is None or after is None else f"{after - before:+.5g}"


def as_number(value: object) -> float | None:
    """Return a value that was measured as a finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        # A whole number beyond every float.
        return None


def _text(value: Any) -> str:
    if value is ABSENT:
        return "-"
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, str):
        # As Python spells it: a text of another's can hold what steers a terminal.
        return LONG_HASH.sub(r"\1", value if value.isprintable() else ascii(value))
    return json.dumps(value, default=str)


def print_table(rows: list[tuple[str, str, str, str]]) -> None:
    """Print rows of texts in columns, names to the left and values to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *values in rows:
        cells = [name.ljust(widths[0])]
        cells += [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
        print("  ".join(cells).rstrip())


def main() -> None:
    """Read the command line and compare."""
    parser = command_parser(__doc__)
    parser.add_argument("left", metavar="RUN", help="run directory, revision or experiment")
    parser.add_argument("right", metavar="RUN", help="the other one")
    arguments = parser.parse_args()
    run_guarded(lambda: compare(arguments.left, arguments.right))


if __name__ == "__main__":
    main()
