import errno
import mmap
import os

import numpy as np
import pytest

from cache import mapping as module
from cache.errors import CorruptShardError
from cache.mapping import MAP_FAILED, FeatureMapping

PAGE = mmap.ALLOCATIONGRANULARITY


def write_rows(path, rows, offset):
    path.write_bytes(b"\xff" * offset + rows.tobytes() + b"\xff" * 99)
    return {"num_bytes": offset + rows.nbytes + 99, "offset": offset, "rows": len(rows)}


def random_rows(count, patches, width):
    return np.random.default_rng(count).standard_normal((count, patches, width)).astype("<f2")


@pytest.mark.parametrize(("patches", "width"), [(1, 1), (4, 6), (3, 7), (49, 768), (16, 128)])
def test_rows_of_files_of_any_length_stand_where_the_starts_say(tmp_path, patches, width):
    counts = [1, 300, 0, 7, 64]
    mapping = FeatureMapping(counts, patches, width)
    shards = [random_rows(count, patches, width) for count in counts]
    for number in (3, 0, 4, 2, 1):
        path = tmp_path / str(number)
        where = write_rows(path, shards[number], PAGE * (number + 1))
        mapping.attach(number, path, **where)
    for start, rows in zip(mapping.starts, shards, strict=True):
        assert np.array_equal(mapping.rows[start : start + len(rows)], rows)
    assert mapping.rows.shape[1:] == (patches, width)


def test_a_mapping_of_no_shards_has_rows_too():
    assert FeatureMapping([], 4, 6).rows.shape[1:] == (4, 6)


def test_rows_cannot_be_written(tmp_path):
    mapping = FeatureMapping([2], 4, 6)
    mapping.attach(0, tmp_path / "a", **write_rows(tmp_path / "a", random_rows(2, 4, 6), PAGE))
    with pytest.raises(ValueError, match="read-only"):
        mapping.rows[0] = 0


def test_addresses_that_cannot_be_reserved_are_an_error_that_says_so():
    with pytest.raises(OSError, match=r"bytes of addresses .*cannot be reserved.*ulimit -v"):
        FeatureMapping([2**30] * 1000, 49, 768)


def test_a_reserved_terabyte_takes_no_memory():
    mapping = FeatureMapping([2**40 // (49 * 768 * 2)], 49, 768)
    assert not mapping.rows[-1].any()


@pytest.mark.parametrize("size", [0, PAGE, 2 * PAGE, 3 * PAGE])
def test_a_file_of_another_size_is_not_mapped(tmp_path, size):
    where = write_rows(tmp_path / "a", random_rows(1000, 4, 6), PAGE)
    os.truncate(tmp_path / "a", size)
    with pytest.raises(CorruptShardError, match=f"a: has {size} bytes, had"):
        FeatureMapping([1000], 4, 6).attach(0, tmp_path / "a", **where)


def test_a_mapping_that_the_system_refuses_is_an_error_that_names_the_file(tmp_path):
    where = write_rows(tmp_path / "a", random_rows(2, 4, 6), PAGE + 1)
    with pytest.raises(OSError, match=r"cannot be mapped: Invalid argument: .*a'"):
        FeatureMapping([2], 4, 6).attach(0, tmp_path / "a", **where)


def test_a_process_with_too_many_mappings_is_told_the_limit_of_the_system(tmp_path, monkeypatch):
    where = write_rows(tmp_path / "a", random_rows(2, 4, 6), PAGE)
    mapping = FeatureMapping([2], 4, 6)
    monkeypatch.setattr(mapping, "_libc_mmap", lambda *arguments: MAP_FAILED)
    monkeypatch.setattr("ctypes.get_errno", lambda: errno.ENOMEM)
    with pytest.raises(OSError, match=r"sysctl vm\.max_map_count"):
        mapping.attach(0, tmp_path / "a", **where)


@pytest.mark.parametrize(("limit", "is_huge"), [("max", True), ("64", False), ("640000", True)])
def test_a_store_that_fits_half_of_the_memory_is_read_in_huge_pages(
    tmp_path, monkeypatch, limit, is_huge
):
    (tmp_path / "memory.max").write_text(limit)
    monkeypatch.setattr(module, "CONTROL_GROUPS", tmp_path)
    advised = []
    monkeypatch.setattr(FeatureMapping, "_advise", lambda self, *advice: advised.append(advice))
    where = write_rows(tmp_path / "a", random_rows(300, 4, 6), PAGE)
    mapping = FeatureMapping([300], 4, 6)
    mapping.attach(0, tmp_path / "a", **where)
    assert advised == [(0, 300, mmap.MADV_HUGEPAGE)] * is_huge


@pytest.mark.parametrize(("limit", "is_asked"), [("max", False), ("64", True)])
def test_rows_of_a_store_that_does_not_fit_the_memory_are_asked_for_before_they_are_read(
    tmp_path, monkeypatch, limit, is_asked
):
    (tmp_path / "memory.max").write_text(limit)
    monkeypatch.setattr(module, "CONTROL_GROUPS", tmp_path)
    mapping = FeatureMapping([300], 4, 6)
    rows = random_rows(300, 4, 6)
    mapping.attach(0, tmp_path / "a", **write_rows(tmp_path / "a", rows, PAGE))
    advised = []
    monkeypatch.setattr(
        FeatureMapping, "_advise_rows", lambda self, *advice: advised.append(advice)
    )
    mapping.request(np.array([7, 2, 7]))
    assert advised == [(row, 1, mmap.MADV_WILLNEED) for row in (7, 2, 7)] * is_asked
    monkeypatch.undo()
    mapping.request(np.arange(300))
    assert np.array_equal(mapping.rows[:300], rows)


def test_a_system_without_huge_pages_is_no_error(tmp_path, monkeypatch):
    def refuse(*advice):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(FeatureMapping, "_advise", refuse)
    rows = random_rows(300, 4, 6)
    mapping = FeatureMapping([300], 4, 6)
    mapping.attach(0, tmp_path / "a", **write_rows(tmp_path / "a", rows, PAGE))
    assert np.array_equal(mapping.rows[:300], rows)


@pytest.mark.parametrize(
    ("groups", "file"),
    [
        ("", "memory.max"),
        ("0::/\n", "memory.max"),
        ("0::/user.slice/run-1.scope\n", "user.slice/run-1.scope/memory.max"),
        ("0::/user.slice/run-1.scope\n", "user.slice/memory.max"),
        ("4:memory:/jobs/7\n1:cpu:/\n0::/\n", "memory/jobs/7/memory.limit_in_bytes"),
        ("4:memory:/jobs/7\n1:cpu:/\n0::/\n", "memory/jobs/memory.limit_in_bytes"),
        ("4:memory:/docker/ab\n", "memory/memory.limit_in_bytes"),
    ],
)
def test_the_memory_of_a_control_group_and_of_those_above_counts(
    tmp_path, monkeypatch, groups, file
):
    (tmp_path / "own").write_text(groups)
    monkeypatch.setattr(module, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(module, "OWN_GROUPS", tmp_path / "own")
    machine = module.memory_bytes()
    assert machine == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = tmp_path / file
    limit.parent.mkdir(parents=True, exist_ok=True)
    limit.write_text("1048576\n")
    assert module.memory_bytes() == 2**20
    limit.write_text("max\n")
    assert module.memory_bytes() == machine
