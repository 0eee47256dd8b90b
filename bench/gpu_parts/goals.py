"""What follows from the rows of `bench.gpu`: the hours of the real run, and the goals."""

from typing import Any

from bench.gpu_parts.arithmetic import EPOCHS, GENERATION_BATCH, Rates, recipe_hours
from bench.gpu_parts.report import Rows, measured
from bench.measure import at_least, at_most
from bench.step import FINETUNE, PRETRAIN

CHIP, RIGHT, TRAINING = "chip", "right", "training"
EXTRACTION, GENERATION, COMPILED = "extraction", "generation", "compiled"
SIZES, SMALL_CARDS = "sizes", "small cards"

NF4, BF16 = "nf4", "bf16"
OURS, USUAL, PACKING = "ours", "usual loop", "packing loop"

COMPARED = ", as many images as the others"
COCO_STEP = f"{OURS}, a step of coco.yaml"
JPEGS = "JPEGs to shards"

LEAST_OF_USUAL, LEAST_OF_PACKING, LEAST_SHARE = 4.0, 1.5, 0.4
MOST_EPOCH_MINUTES, MOST_COMPILATIONS, MOST_HOST_WAITS = 30.0, 0, 1
"""The goals: of stage 1, and of all rows of our own loop."""

MOST_DIFFERENCE = 5e-2
"""Relative L2 difference of our gradients from those of another loop. Both compute in bf16, which
is 1e-2 off; another loss or another mask is off by a multiple.
"""


def row_name(weights: str, stage: str, what: str) -> str:
    """Return the name of a row of the parts TRAINING, COMPILED and SIZES."""
    return f"{weights}, {stage}: {what}"


def conclude(parts: dict[str, Rows]) -> dict[str, Any]:
    """Return the hours of configs/coco.yaml and the goals, of whatever has been measured."""
    hours = recipe_hours(rates_of(parts))
    return {"hours_of_coco_yaml": hours, "goals": goals_of(parts, hours)}


def rates_of(parts: dict[str, Rows]) -> Rates:
    """Find the rates that the real run has."""

    def value(part: str, row: str, key: str) -> float | None:
        found = measured(parts.get(part), row)
        return None if found is None else found[key]

    def step(stage: str) -> float | None:
        return value(TRAINING, row_name(NF4, stage, COCO_STEP), "texts_per_second")

    return Rates(
        captions_per_second=step(PRETRAIN),
        conversations_per_second=step(FINETUNE),
        images_per_second=value(EXTRACTION, f"ViT-B-32-quickgelu, {JPEGS}", "images_per_second"),
        seconds_per_token=value(
            GENERATION, f"{NF4}, {GENERATION_BATCH} texts", "seconds_per_token_of_a_batch"
        ),
    )


def goals_of(parts: dict[str, Rows], hours: dict[str, float | None]) -> dict[str, Any]:
    """Judge every goal whose rows have been measured."""
    training: Rows = {}
    for part in (TRAINING, COMPILED, SIZES):
        training |= measured_rows(parts, part)
    goals: dict[str, Any] = {}
    for weights in (NF4, BF16):
        ours = _values(training, row_name(weights, PRETRAIN, OURS + COMPARED), "texts_per_second")
        for other, least in ((USUAL, LEAST_OF_USUAL), (PACKING, LEAST_OF_PACKING)):
            others = _values(training, row_name(weights, PRETRAIN, other), "texts_per_second")
            if ours and others:
                goals[f"stage 1, {weights}: {OURS} / fastest {other}"] = at_least(
                    least, ours[0] / max(others)
                )
    our_rows = [f"{row_name(w, s, OURS)}" for w in (NF4, BF16) for s in (PRETRAIN, FINETUNE)]
    found: dict[str, tuple[float, list[float]]] = {
        "minutes of stage 1's epoch of coco.yaml": (
            MOST_EPOCH_MINUTES,
            [] if hours["pretrain"] is None else [60 * hours["pretrain"] / EPOCHS["pretrain"]],
        ),
        "difference of the gradients": (
            MOST_DIFFERENCE,
            [row["difference"] for row in training.values() if "difference" in row],
        ),
        "compilations after the first steps": (
            MOST_COMPILATIONS,
            [value for name in our_rows for value in _values(training, name, "compilations")],
        ),
        "host waits of a step": (
            MOST_HOST_WAITS,
            [value for name in our_rows for value in _values(training, name, "host_waits")],
        ),
        "comparisons with the CPU beyond their limits": (0, _beyond_limits(parts)),
    }
    shares = _values(training, row_name(BF16, PRETRAIN, OURS), "share_of_bf16")
    if shares:
        goals["stage 1, bf16: share of the chip's bf16 rate"] = at_least(LEAST_SHARE, max(shares))
    return goals | {
        name: at_most(limit, max(values)) for name, (limit, values) in found.items() if values
    }


def measured_rows(parts: dict[str, Rows], part: str) -> Rows:
    """Return the rows of a part that were measured."""
    rows = parts.get(part, {})
    return {name: row for name in rows if (row := measured(rows, name)) is not None}


def _values(rows: Rows, prefix: str, key: str) -> list[float]:
    """Return a value of all rows with names that begin so; None is left out."""
    values = [row.get(key) for name, row in rows.items() if name.startswith(prefix)]
    return [value for value in values if value is not None]


def _beyond_limits(parts: dict[str, Rows]) -> list[float]:
    """Return how many comparisons with the CPU were beyond their limits, if there were any."""
    within = [row["within"] for row in measured_rows(parts, RIGHT).values() if "within" in row]
    return [within.count(False)] if within else []
