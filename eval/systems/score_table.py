"""Lays out the scores of several systems as one table, in the units of papers."""

from collections.abc import Sequence

from eval.systems.scored import WORDS, Scored

Row = tuple[str, ...]

CAPTION_COLUMNS = (WORDS, "CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L")
POPE_COLUMNS = (WORDS, "accuracy", "precision", "recall", "f1", "yes_rate")

HEADS = {"f1": "F1", "yes_rate": "yes-rate"}
"""Names of scores whose heads differ from their keys."""

UNITS = "Scores are times 100, as papers print them"
CAPTION_UNITS = f"{UNITS}: CIDEr 100 and BLEU 100 here are 1.0 in reports/eval.json."
BENEATH = "In brackets: 95 % intervals over images."

SEED = 0
"""Of the draws of images."""


def caption_rows(systems: Sequence[Scored]) -> list[Row]:
    """Return the rows of a table of captions: head, systems, differences to the first one."""
    return [
        _head("texts", CAPTION_COLUMNS),
        *_rows(systems[0], systems[0], CAPTION_COLUMNS),
        *(row for system in systems[1:] for row in _rows(systems[0], system, CAPTION_COLUMNS)),
    ]


def pope_rows(systems: Sequence[Sequence[Scored]]) -> list[Row]:
    """Return the rows of a table of yes-no answers, a system's subsets together."""
    first = {part.part: part for part in systems[0]}
    rows = [_head("questions", POPE_COLUMNS)]
    for parts in systems:
        for part in parts:
            rows += _rows(first.get(part.part), part, POPE_COLUMNS)
    return rows


def differing_notes(first: Scored | None, other: Scored) -> str:
    """Return why a system has no difference to the first one, or nothing."""
    if first is None or first.text_keys == other.text_keys:
        return ""
    what = f"other questions of subset {other.part}" if other.part else "other images"
    return (
        f"{other.system}: no difference to {first.system} is printed, because {first.system} has "
        f"texts for {what}"
    )


def _head(texts: str, columns: Sequence[str]) -> Row:
    return ("", texts, *(HEADS.get(column, column) for column in columns))


def _rows(first: Scored | None, system: Scored, columns: Sequence[str]) -> list[Row]:
    """Return a system's scores, their intervals, and its gains over the first system."""
    ids = system.image_ids
    measures = {column: system.measures[column] for column in columns}
    intervals = {name: measure.interval(ids, SEED) for name, measure in measures.items()}
    name = f"{system.system}, {system.part}" if system.part else system.system
    rows = [
        (name, str(system.count), *(_number(n, m.value) for n, m in measures.items())),
        ("", "", *(_ends(column, ends) for column, ends in intervals.items())),
    ]
    if first is None or first is system or first.text_keys != system.text_keys:
        return rows
    gains = {
        column: measure.gain_over(first.measures[column], ids, SEED)
        for column, measure in measures.items()
    }
    return [
        *rows,
        (f"  less {first.system}", "", *(_number(n, g.gain, "+") for n, g in gains.items())),
        ("", "", *(_ends(column, gain.interval, "+") for column, gain in gains.items())),
        ("", "", *(gain.p_text for gain in gains.values())),
    ]


def _ends(column: str, interval: Sequence[float], sign: str = "") -> str:
    low, high = (_number(column, end, sign, decimals=1) for end in interval)
    return f"[{low}, {high}]"


def _number(column: str, value: float, sign: str = "", decimals: int = 2) -> str:
    return f"{value if column == WORDS else 100 * value:{sign}.{decimals}f}"
