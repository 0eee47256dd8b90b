"""Counts the rejected records of the index stage, and refuses an index with too many."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.indexing.records import Kind, Rejection
from workspace.errors import StageError

NOT_INDEXED = "image not in the index"
"""Reason of POPE's questions about other images: most of them, unless all of COCO is indexed."""

TEXT_ONLY = "text only"
"""Reason of conversations about no image, of which LLaVA-1.5's mixture has 40,688."""

FAULTLESS = (NOT_INDEXED, TEXT_ONLY)
"""Reasons of records that are left out, although nothing is wrong with them."""


def check_reject_rates(
    rejected: Sequence[Rejection], num_read: Mapping[Kind, int], limit: float, table: Path
) -> None:
    """Refuse an index in which too many records of a kind are rejected.

    Args:
        rejected: All rejections; those of records without a fault of their own do not count.
        num_read: Number of records read, by kind.
        limit: Greatest share of rejected records of a kind.
        table: File of all rejections, which the error names.

    Raises:
        StageError: A share is above the limit; gives the commonest reasons with an example each.
    """
    for kind, num_records in num_read.items():
        faulty = [r for r in faulty_records(rejected) if r.kind == kind]
        if len(faulty) > limit * num_records:
            raise StageError(
                f"{kind}: {len(faulty)} of {num_records} rejected, "
                f"data.max_reject_rate allows {limit:g}. {describe_commonest(faulty)} "
                f"All of them: {table}. Mend the inputs, or raise the limit."
            )


def faulty_records(rejected: Sequence[Rejection]) -> list[Rejection]:
    """Return the rejections of records with a fault of their own."""
    return [rejection for rejection in rejected if rejection.reason_class not in FAULTLESS]


def describe_commonest(rejected: Sequence[Rejection]) -> str:
    """Return a sentence with the three commonest reasons and an example of each."""
    counts = Counter(rejection.reason_class for rejection in rejected)
    examples = {rejection.reason_class: rejection for rejection in reversed(rejected)}
    reasons = [
        f"{count} x {reason} ({examples[reason].record}: {examples[reason].reason})"
        for reason, count in counts.most_common(3)
    ]
    return f"Commonest reasons: {'; '.join(reasons)}."


def count_records(kind: Kind, rejected: Sequence[Rejection], num_read: int) -> dict[str, Any]:
    """Return the numbers of read, kept and rejected records of a kind, and of each reason."""
    reasons = Counter(r.reason_class for r in rejected if r.kind == kind)
    return {
        "read": num_read,
        "kept": num_read - reasons.total(),
        "rejected": reasons.total(),
        "reasons": dict(sorted(reasons.items())),
    }
