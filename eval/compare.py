"""Command: compares two evaluations: scores with 95 % intervals, and the texts that differ.

python -m eval.compare . ../elsewhere
python -m eval.compare HEAD lucid-wave

An evaluation is a workspace, its reports folder, or a revision of this repository: a commit, a tag
or the name of a DVC experiment; `workspace` is what lies here. The difference is the second minus
the first. Shown are the models' own scores;
`python -m train.compare` has their controls, the settings and what the runs were made from.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cache.cli.command import command_parser, run_guarded
from eval.evaluation import Evaluation, Row, read_evaluation
from eval.report.scores import CONTROLS
from train.compare import as_number, print_table

EXAMPLES = 10
"""Most examples that are shown of a model and kind of text: a CIDEr and an F1 have no common scale,
and so no common order."""

APART = "*"
INTERVALS = "intervals"
NO_SCORES = ("contamination", "weights_sha256")
"""Sections of `reports/eval.json` that say what was scored."""
ABSENT = object()
"""What an evaluation has under a name that only the other one knows."""


@dataclass(frozen=True)
class Pairing:
    """The texts of one model and kind, each beside the other evaluation's about the same."""

    equal: list[tuple[Row, Row]] = field(default_factory=list)
    differing: list[tuple[Row, Row]] = field(default_factory=list)
    only_left: list[Row] = field(default_factory=list)
    only_right: list[Row] = field(default_factory=list)


def compare(left_name: str, right_name: str) -> None:
    """Print how two evaluations differ.

    Raises:
        SettingsError: One of them is no folder with an evaluation, and no revision.
        StageError: One of them is not complete, or its files are damaged.
    """
    left, right = read_evaluation(left_name), read_evaluation(right_name)
    print_table(score_rows(left, right))
    print_notes(left, right)
    for (model, kind), pairing in pair_texts(left.predictions, right.predictions).items():
        print_pairing(f"{printable(model)}, {printable(kind)}", pairing, left.name, right.name)


def score_rows(left: Evaluation, right: Evaluation) -> list[tuple[str, str, str, str]]:
    """Return the lines of the table of scores: what differs, and how many do not."""
    names = [name for name in left.scores if is_own_score(name)]
    names += [n for n in right.scores if is_own_score(n) and n not in left.scores]
    rows = [("", printable(left.name), printable(right.name), "second - first")]
    for name in names:
        one, other = (of.scores.get(name, ABSENT) for of in (left, right))
        if same(one, other) and interval(left, name) == interval(right, name):
            continue
        mark = APART if lie_apart(interval(left, name), interval(right, name)) else " "
        cells = (cell(left, name), cell(right, name), f"{difference(one, other)} {mark}")
        rows.append((printable(name), *cells))
    return [*rows, (f"{len(names) + 1 - len(rows)} scores equal", "", "", "")]


def print_notes(left: Evaluation, right: Evaluation) -> None:
    """Say what the marks mean, and where there can be none."""
    print(f"{APART} the 95 % intervals do not overlap")
    for of in (left, right):
        if not any(INTERVALS in name.split(".") for name in of.scores):
            print(f"{printable(of.name)} has no intervals: what is chance in it is not known")


def is_own_score(name: str) -> bool:
    """Whether a dotted name is of a score of a model with an image's own features."""
    parts = name.split(".")
    return parts[0] not in NO_SCORES and not {INTERVALS, *CONTROLS} & set(parts)


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal, or both are no number."""
    return bool(one == other or (one != one and other != other))


def interval(of: Evaluation, name: str) -> tuple[float, float] | None:
    """Return the interval of a score, if it has one."""
    section, _, key = name.rpartition(".")
    ends = [as_number(of.scores.get(f"{section}.{INTERVALS}.{key}.{end}")) for end in (0, 1)]
    return None if None in ends else (ends[0], ends[1])  # type: ignore[return-value]


def lie_apart(one: tuple[float, float] | None, other: tuple[float, float] | None) -> bool:
    """Whether there are two intervals, and they have no number in common."""
    if one is None or other is None:
        return False
    return one[1] < other[0] or other[1] < one[0]


def cell(of: Evaluation, name: str) -> str:
    """Write a score, and its interval if it has one."""
    ends = interval(of, name)
    written = number(of.scores.get(name, ABSENT))
    return written if ends is None else f"{written} [{number(ends[0])}, {number(ends[1])}]"


def number(value: Any) -> str:
    """Write a score, or what stands in its place."""
    if value is ABSENT or value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value))


def difference(one: Any, other: Any) -> str:
    """Write by how much the second score is greater, if both are numbers."""
    before, after = as_number(one), as_number(other)
    return "" if before is None or after is None else f"{after - before:+.4g}"


def pair_texts(left: Sequence[Row], right: Sequence[Row]) -> dict[tuple[str, str], Pairing]:
    """Put texts about the same side by side: same model, kind, subset, image and question.

    Returns:
        Model and kind to their texts, in the order of the first evaluation.
    """
    ours, theirs = by_question(left), by_question(right)
    pairings: dict[tuple[str, str], Pairing] = {}
    for key in ours | theirs:
        pairing = pairings.setdefault(key[:2], Pairing())
        one, other = ours.get(key), theirs.get(key)
        if other is None and one is not None:
            pairing.only_left.append(one)
        elif one is None and other is not None:
            pairing.only_right.append(other)
        elif one is not None and other is not None:
            equal = one["prediction"] == other["prediction"]
            (pairing.equal if equal else pairing.differing).append((one, other))
    return pairings


def by_question(rows: Sequence[Row]) -> dict[tuple[Any, ...], Row]:
    """Return rows by what they are about; who asks the same twice is answered twice."""
    seen: Counter[tuple[Any, ...]] = Counter()
    found = {}
    for row in rows:
        about = tuple(row[name] for name in ("model", "kind", "subset", "image_id", "question"))
        seen[about] += 1
        found[(*about, seen[about])] = row
    return found


def print_pairing(title: str, pairing: Pairing, left: str, right: str) -> None:
    """Print how many texts differ, and those whose scores differ most."""
    print(
        f"\n{title}: {len(pairing.differing)} texts differ, {len(pairing.equal)} are equal, "
        f"{len(pairing.only_left)} only in {printable(left)}, "
        f"{len(pairing.only_right)} only in {printable(right)}"
    )
    width = max(len("targets"), len(printable(left)), len(printable(right)))
    for one, other in sorted(pairing.differing, key=score_gap, reverse=True)[:EXAMPLES]:
        about = [f"image {one['image_id']}", one["subset"], one["question"]]
        print("  " + ", ".join(printable(part) for part in about if part))
        targets = [one["targets"]] + [other["targets"]] * (one["targets"] != other["targets"])
        for texts in targets:
            print(f"    {'targets':<{width}}         {' | '.join(map(printable, texts))}")
        for name, row in ((left, one), (right, other)):
            text = printable(row["prediction"])
            print(f"    {printable(name):<{width}} {number(row['score']):>7} {text}")


def score_gap(pair: tuple[Row, Row]) -> float:
    """Return how far the scores of two texts are apart; 0 if one has none."""
    one, other = (as_number(row["score"]) for row in pair)
    return 0.0 if one is None or other is None else abs(one - other)


def printable(text: str) -> str:
    """Spell a text as Python does, where it is empty or holds what could steer a terminal."""
    return text if text and text.isprintable() else ascii(text)


def main() -> None:
    """Read the command line and compare."""
    parser = command_parser(__doc__)
    parser.add_argument("left", metavar="EVALUATION", help="folder, revision or experiment")
    parser.add_argument("right", metavar="EVALUATION", help="the other one")
    arguments = parser.parse_args()
    run_guarded(lambda: compare(arguments.left, arguments.right))


if __name__ == "__main__":
    main()
