"""Writes what README.md and pages of docs/ show of result files.

python -m tests.documents.measured_tables

A reader that the result file lacks, because it was added after the run, has no row.
"""

import json
import re
from functools import cache
from pathlib import Path

from tests.documents import scaling_page

ROOT = Path(__file__).parents[2]

OURS, LIMIT, USUAL = "FeatureBatches", "array in memory, np.take", "h5py in a DataLoader, 0 workers"

READERS = {
    "`FeatureStore.gather` into a buffer": "FeatureStore.gather",
    "`FeatureBatches`, into torch": OURS,
    "array in memory, `numpy.take` (the limit)": LIMIT,
    "Hugging Face datasets, torch format": "HF datasets, torch format",
    "h5py in a DataLoader, 0 workers": USUAL,
    "h5py in a DataLoader, 2 workers": "h5py in a DataLoader, 2 workers",
    "LitData": "LitData",
    "one npy a file, DataLoader": "one npy a file in a DataLoader",
    "webdataset": "webdataset",
    "MosaicML StreamingDataset": "MosaicML StreamingDataset",
    "safetensors by slices, DataLoader": "safetensors slices in a DataLoader",
    "Lance, `take` in a DataLoader": "Lance take in a DataLoader",
    "Lance, LanceDataset (shuffles batches)": "Lance LanceDataset, whole batches shuffled",
    "TensorStore, Zarr v3 with shards": "TensorStore, zarr3",
    "zarrs, Zarr v3 with shards, DataLoader": "zarrs in a DataLoader",
    "Grain over ArrayRecord": "Grain over ArrayRecord",
    "embedding-reader (in order, float32)": "embedding-reader, in order",
}
"""What the table of readers shows to the contender in the result file, whose number of workers is
left out where the better one is shown."""

FORMATS = {
    "patchcache": ("FeatureBatches", "one copy out of a mapping", "byte for byte",
                   "fingerprint; refused on mixing", "its shard", "new shards"),
    "Arrow (Hugging Face)": ("HF datasets, torch format", "map, through Arrow arrays", "yes",
                             "hash of the code, in the cache's name", "the data set",
                             "whole files"),
    "one big HDF5": (USUAL, "a call a row, or a map if contiguous",
                     "if times and versions are pinned", "if somebody wrote it down", "the file",
                     "the file"),
    "one npy a file": ("one npy a file in a DataLoader", "a file a row", "yes", "no", "its file",
                       "123,287 files"),
    "safetensors": ("safetensors slices in a DataLoader", "a copy out of a map, a call a row",
                    "yes", "if somebody wrote it down", "its file", "files"),
    "Lance": ("Lance take in a DataLoader", "a read a row, in threads", "no: random file names",
              "versions of the table", "its row, in a new file", "new files"),
    "Zarr v3, sharded": ("TensorStore, zarr3", "a read a row, in threads", "yes",
                         "if somebody wrote it down", "its shard", "shards"),
    "ArrayRecord": ("Grain over ArrayRecord", "a read a row", "by order of writing", "no",
                    "its file", "files"),
    "LitData": ("LitData", "a chunk a row, decode", "by order of writing", "no", "the data set",
                "chunks"),
    "webdataset (tar)": ("webdataset", "none: in order, through a buffer", "by order of writing",
                         "no", "its tar", "tars"),
    "MDS (MosaicML)": ("MosaicML StreamingDataset", "a seek in a shard, decode",
                       "by order of writing", "no", "the data set", "shards"),
}  # fmt: skip
"""Format to its contender in the result file, and its other cells."""

STEPS = {
    "index: all records to tables": "index",
    "plan: all images to shards": "plan",
    "write: `cache.write_store`": "write",
    "open": "open",
    "verify every byte": "verify",
    "gather random batches of 64": "gather",
    "an epoch in global order": "epoch, global",
    "an epoch in windowed order": "epoch, windowed, read ahead",
    "`dvc repro`, nothing changed": "repro",
}

FIGURES = ("seconds", "rows_per_second", "peak_anonymous_gib")


@cache
def result(name: str):
    return json.loads((ROOT / f"bench/results/{name}.json").read_text())


def contender(name: str, kind: str = "warm") -> str | None:
    """The name in the result file of a reader: with the number of workers that suits it best."""
    medians = result("read")[kind]["median"]
    names = (name, f"{name}, 0 workers", f"{name}, 2 workers")
    return max(
        (found for found in names if found in medians), key=medians.__getitem__, default=None
    )


def shown(value: float) -> str:
    """A number with two digits that count; with three from 100,000 on."""
    digits = 3 if value >= 100_000 else 2
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:#.2g}".rstrip(".")


def rate(name: str, kind: str) -> str:
    value = result("read")[kind]["median"].get(contender(name, kind))
    return "" if value is None else shown(value)


def by_rate(names: dict[str, str]) -> list[str]:
    """The labels of readers that were measured, the fastest first."""
    warm = result("read")["warm"]["median"]
    measured = {label: warm[found] for label, name in names.items() if (found := contender(name))}
    return sorted(measured, key=measured.__getitem__, reverse=True)


def table_of_readers() -> list[str]:
    fixed = list(READERS)[:3]
    labels = fixed + [label for label in by_rate(READERS) if label not in fixed]
    rows = [[label, *(rate(READERS[label], kind) for kind in ("warm", "cold"))] for label in labels]
    return as_table(["64 random rows a batch", "warm, rows/s", "from the disk, rows/s"], rows)


def table_of_formats() -> list[str]:
    head = ["", "random rows", "rows/s", "two writes are equal", "knows what made it",
            "a changed image costs", "what travels"]  # fmt: skip
    rows = []
    for label in by_rate({label: name for label, (name, *_) in FORMATS.items()}):
        name, access, *others = FORMATS[label]
        rows.append([label, access, rate(name, "warm"), *others])
    return as_table(head, rows)


def table_of_full_size() -> list[str]:
    rows = []
    for label, step in STEPS.items():
        figures = result("full_coco")[step]
        rows.append([label, *(shown(figures[key]) if key in figures else "" for key in FIGURES)])
    return as_table(["123,287 images", "seconds", "rows/s", "own memory, GiB"], rows)


def table_of_remote_readers() -> list[str]:
    head = ["from an S3 server 20 ms away, 90 MB/s a connection", "first epoch, rows/s",
            "later epochs, rows/s", "requests of the first"]  # fmt: skip
    measured = next(iter(result("remote")["networks"].values()))
    rows = []
    for name, found in sorted(measured.items(), key=lambda item: -item[1]["first_epoch"]):
        later = found["later_epochs"]
        rows.append([name, shown(found["first_epoch"]), shown(later) if later else "not kept",
                     f"{found['requests']:,}"])  # fmt: skip
    return as_table(head, rows)


def as_table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["".join(f"| {cell} " if cell else "| " for cell in row) + "|" for row in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def with_table(text: str, lines: list[str]) -> str:
    """The text with a table in the place of the one with the same first line."""
    found = re.search(rf"^{re.escape(lines[0])}\n(?:\|.*\n)*", text, re.M)
    assert found, lines[0]
    return text[: found.start()] + "\n".join(lines) + "\n" + text[found.end() :]


def format_page(text: str) -> str:
    for lines in (table_of_readers(), table_of_formats(), table_of_full_size()):
        text = with_table(text, lines)
    limit = shown(result("read")["warm"]["median"][LIMIT])
    return re.sub(r"(array in memory gives )[\d,]+", rf"\g<1>{limit}", text)


def readme(text: str) -> str:
    warm = result("read")["warm"]["median"]
    ours, usual = warm["FeatureStore.gather"], warm[USUAL]
    figures = f"| {shown(ours)} | {shown(usual)} (h5py in a DataLoader) | {shown(ours / usual)} |"
    return re.sub(r"(?<=#reading-speed\)\) )\|.*\|$", figures, text, flags=re.M)


PAGES = {
    ROOT / "README.md": readme,
    ROOT / "docs/format.md": format_page,
    ROOT / "docs/sharing.md": lambda text: with_table(text, table_of_remote_readers()),
    scaling_page.PAGE: lambda text: scaling_page.render(),
}

if __name__ == "__main__":
    for page, written in PAGES.items():
        page.write_text(written(page.read_text()))
