import numpy as np

from bench.large_index import make_index, measure_size, read_index
from bench.stores import SPEC
from cache.plan import plan_shards
from cache.store_index import StoreIndex


def test_the_made_index_is_read_as_it_was_made(tmp_path):
    ids = np.arange(0, 50_000, 5)
    hashes = np.random.default_rng(0).integers(0, 2**64, (2, len(ids)), np.uint64)
    plan = plan_shards(ids, hashes[0], SPEC.fingerprint, 64)
    made, path = make_index(plan, hashes[1]), tmp_path / "index.parquet"
    made.write(path)
    found = StoreIndex.read(path, SPEC)
    assert found.shards == made.shards
    assert {shard.name for shard in found.shards} == {shard.name for shard in plan}
    for name in ("image_ids", "shard_number", "row", "row_xxh3", "source_xxh3"):
        assert np.array_equal(getattr(found, name), getattr(made, name))
    assert np.array_equal(found.image_ids, ids)


def test_the_figures_of_a_size_are_those_of_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.large_index.in_fresh_process", read_index)
    found = measure_size(3000, tmp_path)
    assert found["bytes"] == (tmp_path / "index.parquet").stat().st_size
    assert 0 < found["entry_bytes"] < found["footer_bytes"] < found["bytes"]
    assert found["read_peak_bytes"] >= found["read_bytes"]
