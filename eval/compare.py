"""Command: compares two runs or evaluations: settings, provenance, scores, texts.

python -m eval.compare HEAD lucid-wave
python -m eval.compare . ../elsewhere
python -m eval.compare runs/finetune copies/finetune

Names a workspace, its reports folder, a revision of this repository (a commit, a tag, a DVC
experiment; `workspace` for the checked-out files), or a run directory. Only differences are shown,
scores with their 95 % intervals, the difference as the second minus the first, and the texts whose
scores differ most. The difference of a score has an interval of its own if both sides have texts
about the same questions. A run directory is compared with another one, and has no scores or texts.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cache.cli.command import command_parser, run_guarded
from cache.errors import SettingsError
from eval.bootstrap import Gain
from eval.scoring.gains import judgement
from eval.scoring.paired_scores import paired_gains
from eval.scoring.score_names import CONTROLS, as_number
from eval.snapshots import (
    REPORTS_FILES,
    PredictionRow,
    Snapshot,
    is_run_directory,
    read_predictions,
    read_snapshot,
)
from eval.text_table import print_table, printable, shown
from workspace.errors import StageError

SHOWN_TEXTS = 10
"""Most pairs of texts that are shown of a model and kind; the scores of two kinds (a CIDEr and an
F1) have no common scale."""

MISSING = object()
"""The value of a name that only the other side has."""

Interval = tuple[float, float]
Intervals = Mapping[str, Interval]
TableRow = tuple[str, str, str, str]


@dataclass(frozen=True)
class Pairing:
    """The predictions of one model and kind, those about the same question in pairs."""

    equal: list[tuple[PredictionRow, PredictionRow]] = field(default_factory=list)
    differing: list[tuple[PredictionRow, PredictionRow]] = field(default_factory=list)
    only_left: list[PredictionRow] = field(default_factory=list)
    only_right: list[PredictionRow] = field(default_factory=list)


def compare(left_name: str, right_name: str) -> None:
    """Print the differences between two runs or evaluations.

    Raises:
        SettingsError: A name is neither a folder with results nor a revision, or only one is a run
            directory.
        StageError: A side is not complete, or a file is damaged. Predictions that cannot be read
            are reported after the tables.
    """
    names = (left_name, right_name)
    runs = [name for name in names if is_run_directory(name)]
    if len(runs) == 1:
        other = right_name if runs[0] == left_name else left_name
        raise SettingsError(
            f"{runs[0]} is a run directory, and {other} is none. Wanted two run directories, or "
            f"two of workspace, reports folder and revision."
        )
    left, right = read_snapshot(left_name), read_snapshot(right_name)
    pairings: dict[tuple[str, str], Pairing] = {}
    unreadable = None
    if left.scores and right.scores:
        try:
            pairings = pair_texts(read_predictions(left), read_predictions(right))
        except (StageError, OSError) as error:
            unreadable = error
    print_table(table_rows(left, right, differences(pairings)))
    if left.scores or right.scores:
        print_score_notes(left, right)
    if unreadable:
        raise unreadable
    for (model, kind), pairing in pairings.items():
        print_pairing(f"{printable(model)}, {printable(kind)}", pairing, left_name, right_name)


def differences(pairings: Mapping[tuple[str, str], Pairing]) -> dict[str, Gain]:
    """Return how much better the second side is, by score, where both were asked the same."""
    gains: dict[str, Gain] = {}
    for (model, kind), pairing in pairings.items():
        if not (pairing.only_left or pairing.only_right):
            gains |= paired_gains(model, kind, [*pairing.equal, *pairing.differing])
    return gains


def table_rows(left: Snapshot, right: Snapshot, gains: Mapping[str, Gain]) -> list[TableRow]:
    """Return the rows of the table: each part's differences, and the number of equal values."""
    rows = [("", printable(left.name), printable(right.name), "second - first")]
    have_runs = REPORTS_FILES not in (left.files, right.files)
    if have_runs:
        rows += part_rows("settings", "settings", left.settings, right.settings)
        rows += part_rows("metrics", "metrics", left.metrics, right.metrics, are_measured=True)
    if left.scores or right.scores:
        intervals = left.intervals, right.intervals
        for title, are_controls in (("scores", False), ("controls", True)):
            sides = (
                {name: v for name, v in side.scores.items() if _is_control(name) == are_controls}
                for side in (left, right)
            )
            rows += part_rows(
                title, "scores", *sides, are_measured=True, intervals=intervals, gains=gains
            )
        rows += part_rows("evaluation", "facts", left.scored, right.scored)
    if have_runs:
        rows += part_rows("provenance", "other facts", left.provenance, right.provenance)
    return rows


def part_rows(
    title: str,
    noun: str,
    left: Mapping[str, Any],
    right: Mapping[str, Any],
    *,
    are_measured: bool = False,
    intervals: tuple[Intervals, Intervals] | None = None,
    gains: Mapping[str, Gain] | None = None,
) -> list[TableRow]:
    """Return the rows of one part: measured values with a difference, scores with a mark."""
    names = [*left, *(name for name in right if name not in left)]
    rows = []
    for name in names:
        before, after = left.get(name, MISSING), right.get(name, MISSING)
        ends = [side.get(name) for side in intervals or ({}, {})]
        if _is_same(before, after) and ends[0] == ends[1]:
            continue
        difference = _difference(before, after) if are_measured else ""
        if intervals and difference:
            difference += _beside_difference((gains or {}).get(name), *ends)
        rows.append((f"  {shown(name)}", _cell(before, ends[0]), _cell(after, ends[1]), difference))
    equal = (f"  {len(names) - len(rows)} {noun} equal", "", "", "")
    return [(title, "", "", ""), *rows, equal]


def _is_control(name: str) -> bool:
    return bool(set(CONTROLS) & set(name.split(".")))


def _is_same(before: Any, after: Any) -> bool:
    # NaN differs from itself.
    return bool(before == after or (before != before and after != after))


def _cell(value: Any, interval: Interval | None) -> str:
    text = "-" if value is MISSING else shown(value)
    return text if interval is None else f"{text} [{shown(interval[0])}, {shown(interval[1])}]"


def _difference(before: Any, after: Any) -> str:
    first, second = as_number(before), as_number(after)
    return "" if first is None or second is None else f"{second - first:+.5g}"


def _beside_difference(gain: Gain | None, one: Interval | None, other: Interval | None) -> str:
    """Return the interval of a difference, if it is paired, and the mark."""
    if gain is None:
        return f" unpaired {'*' if lie_apart(one, other) else ' '}"
    low, high = map(shown, gain.interval)
    return f" [{low}, {high}] {'*' if gain.is_different else ' '}"


def lie_apart(one: Interval | None, other: Interval | None) -> bool:
    """Return whether two intervals are known and have no number in common."""
    if one is None or other is None:
        return False
    return one[1] < other[0] or other[1] < one[0]


def print_score_notes(left: Snapshot, right: Snapshot) -> None:
    """Explain the mark, and say of each side whether its model uses the picture."""
    print("* 0 lies outside the 95 % interval of the difference, over the images of both sides")
    print("  (unpaired: the 95 % intervals of the two scores have no number in common)")
    for side in (left, right):
        if not side.scores:
            print(f"{printable(side.name)} has no scores: evaluate was not run there")
        elif not side.intervals:
            print(f"{printable(side.name)} has no intervals: its scores may differ by chance")
        if side.gains:
            print(f"{printable(side.name)} {judgement(side.gains)}")


def pair_texts(
    left: Sequence[PredictionRow], right: Sequence[PredictionRow]
) -> dict[tuple[str, str], Pairing]:
    """Pair the predictions about the same model, kind, subset, image and question.

    Returns:
        Model and kind to their pairing, in the order of the first evaluation.
    """
    ours, theirs = _by_question(left), _by_question(right)
    pairings: dict[tuple[str, str], Pairing] = {}
    for key in ours | theirs:
        pairing = pairings.setdefault(key[:2], Pairing())
        if key not in theirs:
            pairing.only_left.append(ours[key])
        elif key not in ours:
            pairing.only_right.append(theirs[key])
        else:
            is_equal = ours[key]["prediction"] == theirs[key]["prediction"]
            (pairing.equal if is_equal else pairing.differing).append((ours[key], theirs[key]))
    return pairings


def _by_question(rows: Sequence[PredictionRow]) -> dict[tuple[Any, ...], PredictionRow]:
    """Return predictions by question; repeats of a question are numbered."""
    repeats: Counter[tuple[Any, ...]] = Counter()
    by_question = {}
    for row in rows:
        question = tuple(row[name] for name in ("model", "kind", "subset", "image_id", "question"))
        repeats[question] += 1
        by_question[(*question, repeats[question])] = row
    return by_question


def print_pairing(title: str, pairing: Pairing, left: str, right: str) -> None:
    """Print how many texts differ, and the pairs with the largest differences of the scores."""
    names = [printable(left), printable(right)]
    print(
        f"\n{title}: {len(pairing.differing)} texts differ, {len(pairing.equal)} are equal, "
        f"{len(pairing.only_left)} only in {names[0]}, {len(pairing.only_right)} only in {names[1]}"
    )
    width = max(map(len, ("targets", *names)))
    for pair in sorted(pairing.differing, key=_score_gap, reverse=True)[:SHOWN_TEXTS]:
        question = [f"image {pair[0]['image_id']}", pair[0]["subset"], pair[0]["question"]]
        print("  " + ", ".join(printable(part) for part in question if part))
        targets = [row["targets"] for row in pair]
        for texts in targets[:1] if targets[0] == targets[1] else targets:
            print(f"    {'targets':<{width}}         {' | '.join(map(printable, texts))}")
        for name, row in zip(names, pair, strict=True):
            score = "-" if row["score"] is None else shown(row["score"])
            print(f"    {name:<{width}} {score:>7} {printable(row['prediction'])}")


def _score_gap(pair: tuple[PredictionRow, PredictionRow]) -> float:
    """Return the absolute difference of two scores; 0 if either is missing."""
    one, other = (as_number(row["score"]) for row in pair)
    return 0.0 if one is None or other is None else abs(one - other)


def main() -> None:
    """Read the command line and compare."""
    parser = command_parser(__doc__)
    parser.add_argument("left", metavar="FIRST", help="folder, revision or experiment")
    parser.add_argument("right", metavar="SECOND", help="the other one")
    arguments = parser.parse_args()
    run_guarded(lambda: compare(arguments.left, arguments.right))


if __name__ == "__main__":
    main()
