"""Counts what the index stage leaves out, and refuses when it is too much."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.indexing.records import Kind, Rejection
from workspace.errors import StageError

NOT_INDEXED = "image not in the index"
"""Why a sound question of POPE's is left out. Most are, unless all of COCO is indexed."""


def check_reject_rates(
    rejected: Sequence[Rejection], num_read: Mapping[Kind, int], limit: float, table: Path
) -> None:
    """Refuse an index of which too much is missing.

    Args:
        rejected: All that is left out. What is about images outside of the index does not count.
        num_read: Records read of each kind.
        limit: Greatest share of rejected records of a kind.
        table: Where all rejections can be read, for the error text.

    Raises:
        StageError: Above the limit; names the commonest reasons with an example each.
    """
    for kind, num_records in num_read.items():
        faulty = [r for r in with_faults(rejected) if r.kind == kind]
        if len(faulty) > limit * num_records:
            raise StageError(
                f"{kind}: {len(faulty)} of {num_records} rejected, "
                f"data.max_reject_rate allows {limit:g}. {commonest(faulty)} "
                f"All of them: {table}. Mend the inputs, or raise the limit."
            )


def with_faults(rejected: Sequence[Rejection]) -> list[Rejection]:
    """Return the rejections of records that something is wrong with."""
    return [rejection for rejection in rejected if rejection.reason_class != NOT_INDEXED]


def commonest(rejected: Sequence[Rejection]) -> str:
    """Return the three commonest reasons in a sentence, with an example each."""
    counts = Counter(rejection.reason_class for rejection in rejected)
    examples = {rejection.reason_class: rejection for rejection in reversed(rejected)}
    named = [
        f"{count} x {reason} ({examples[reason].record}: {examples[reason].reason})"
        for reason, count in counts.most_common(3)
    ]
    return f"Commonest reasons: {'; '.join(named)}."


def count(kind: Kind, rejected: Sequence[Rejection], num_read: int) -> dict[str, Any]:
    """Return how many records of a kind were read, kept, and rejected for which reason."""
    reasons = Counter(r.reason_class for r in rejected if r.kind == kind)
    return {
        "read": num_read,
        "kept": num_read - reasons.total(),
        "rejected": reasons.total(),
        "reasons": dict(sorted(reasons.items())),
    }
