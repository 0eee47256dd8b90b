"""Reads what was measured from the result files: the rates that the cost model multiplies with."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cost_parts.sizes import B32, IndexShape
from bench.measure import RESULTS

JPEG = "decode 640x480 JPEG, one process"


@dataclass(frozen=True)
class Rates:
    """Rates of one machine; a second is one of the clock, a core is a virtual CPU."""

    decoded_images: float
    """A second and core: JPEGs of 640 x 480 to pixels."""
    encoded_images: float
    """A second and core, of ViT-B/32 in bf16."""
    jpeg_bytes: int
    """Of an image file."""
    written_bytes: float
    """A second and core, of features: hashed, and written as shards."""
    hashed_bytes: float
    """A second of `FeatureStore.verify`, from memory."""
    disk_bytes: float
    """A second of `cat`, from the disk."""
    open_bytes: float
    """Memory that an open store takes for an image."""
    open_peak_bytes: float
    """Memory for an image while the store is opened, at most."""
    planned_images: float
    """A second of `plan_shards`."""
    index: IndexShape


def result(name: str, results: Path = RESULTS) -> Any:
    """Return a result file; None where it was not measured yet."""
    path = results / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def read_rates(results: Path = RESULTS) -> Rates:
    """Return the rates that the result files say."""
    encode, verify = result("encode_cpu", results), result("verify", results)
    extract = result("extract", results)
    busy = extract["stage"]["seconds"]
    small, large = _ends(result("scale", results)["median"])
    first, last = _ends(result("large_index", results)["images"])
    rows = large[0] - small[0]
    footer = last[1]["footer_bytes"] - last[1]["entry_bytes"]
    num_bytes = verify["setting"]["bytes"]
    return Rates(
        decoded_images=encode["median"][JPEG],
        encoded_images=encode["median"]["ViT-B/32 bf16"] / encode["machine"]["threads"],
        jpeg_bytes=encode["setting"]["jpeg_bytes"],
        written_bytes=extract["setting"]["images"] * B32.row_bytes / (busy["hash"] + busy["write"]),
        hashed_bytes=num_bytes / verify["warm"]["median"]["FeatureStore.verify"],
        disk_bytes=num_bytes / verify["cold"]["median"]["cat > /dev/null"],
        open_bytes=(large[1]["open_bytes"] - small[1]["open_bytes"]) / rows,
        open_peak_bytes=(large[1]["open_peak_bytes"] - small[1]["open_peak_bytes"]) / rows,
        planned_images=last[0] / last[1]["plan_seconds"],
        index=IndexShape(
            row_bytes=(_without_footer(last) - _without_footer(first)) / (last[0] - first[0]),
            group_bytes=footer / last[1]["row_groups"],
        ),
    )


def _ends(by_size: dict[str, Any]) -> tuple[tuple[int, Any], tuple[int, Any]]:
    """Return the smallest and the largest entry, each with its size."""
    entries = sorted((int(size), figures) for size, figures in by_size.items())
    return entries[0], entries[-1]


def _without_footer(entry: tuple[int, Any]) -> float:
    return float(entry[1]["bytes"] - entry[1]["footer_bytes"])
