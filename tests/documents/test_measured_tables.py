"""README.md and docs/format.md show what `bench.read` and `bench.full_coco` measured."""

from tests.documents import measured_tables
from tests.documents.measured_tables import (
    FORMATS,
    PAGES,
    READERS,
    ROOT,
    format_page,
    readme,
    shown,
    table_of_readers,
)

CODE = "".join(
    path.read_text() for path in [ROOT / "bench/read.py", *(ROOT / "bench/readers").glob("*.py")]
)


def test_the_pages_are_made_from_the_result_files():
    for page, written in PAGES.items():
        assert page.read_text() == written(page.read_text()), (
            f"{page.name}: run python -m tests.documents.measured_tables"
        )


def test_every_reader_that_a_table_names_is_measured():
    names = {*READERS.values(), *(name for name, *_ in FORMATS.values())}
    for name in names:
        bare = name.removesuffix(", 0 workers").removesuffix(", 2 workers")
        assert f'"{bare}"' in CODE, name


def test_another_result_changes_both_pages_and_a_reader_without_a_result_has_no_row(monkeypatch):
    medians = {
        "FeatureStore.gather": 200_400.0,
        "FeatureBatches": 150_000.0,
        "array in memory, np.take": 210_000.0,
        "h5py in a DataLoader, 0 workers": 50_000.0,
        "Lance take in a DataLoader, 0 workers": 9_000.0,
        "Lance take in a DataLoader, 2 workers": 12_000.0,
    }
    cold = {name: 1_000.0 for name in medians if "memory" not in name}
    found = {"warm": {"median": medians}, "cold": {"median": cold}}
    result = measured_tables.result
    monkeypatch.setattr(
        measured_tables, "result", lambda name: found if name == "read" else result(name)
    )
    assert table_of_readers()[2:] == [
        "| `FeatureStore.gather` into a buffer | 200,000 | 1,000 |",
        "| `FeatureBatches`, into torch | 150,000 | 1,000 |",
        "| array in memory, `numpy.take` (the limit) | 210,000 | |",
        "| h5py in a DataLoader, 0 workers | 50,000 | 1,000 |",
        "| Lance, `take` in a DataLoader | 12,000 | 1,000 |",
    ]
    assert "| 200,000 | 50,000 (h5py in a DataLoader) | 4.0 |" in readme(
        (ROOT / "README.md").read_text()
    )
    page = format_page((ROOT / "docs/format.md").read_text())
    assert "array in memory gives 210,000" in page
    assert "webdataset (tar)" not in page


def test_two_digits_are_shown():
    figures = {115_673.0: "116,000", 94_870.0: "95,000", 8_010.0: "8,000", 39.9: "40", 3.31: "3.3",
               1.0: "1.0", 0.123: "0.12"}  # fmt: skip
    assert {value: shown(value) for value in figures} == figures
