"""The code that the documentation shows must do what it says."""

import re
from pathlib import Path

import numpy as np

from cache import FeatureStore, Spec
from cache.plan import plan_shards
from cache.publish import publish
from cache.shard import write_shard
from cache.spec import FORMAT

ROOT = Path(__file__).parents[1]

SPEC = Spec(
    format=FORMAT,
    model="tiny",
    weights_sha256="0" * 64,
    activation="gelu",
    layer=-1,
    tokens="patch",
    normalized=False,
    image_size=32,
    resize="shortest",
    crop="center",
    interpolation="bicubic",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    precision="fp32",
    batch_size=4,
    dtype="float16",
    patches=4,
    width=8,
    preprocess_version=1,
)


def test_the_reader_of_the_format_page_reads_a_store(tmp_path):
    image_ids = np.arange(0, 400, 7, dtype=np.int64)
    features = np.random.default_rng(0).standard_normal((len(image_ids), 4, 8)).astype(np.float16)
    plan = plan_shards(image_ids, image_ids.astype(np.uint64), SPEC.fingerprint, 32)
    for shard in plan:
        rows = features[np.searchsorted(image_ids, shard.image_ids)]
        write_shard(tmp_path / "work" / shard.name, SPEC, shard.image_ids, rows)
    publish(tmp_path / "store", plan, tmp_path / "work", SPEC)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/format.md").read_text(), re.DOTALL)
    namespace: dict[str, type] = {}
    exec(code, namespace)
    asked = np.random.default_rng(1).choice(image_ids, 100).tolist()
    found = namespace["Reader"](tmp_path / "store").gather(asked)
    assert np.array_equal(found, FeatureStore(tmp_path / "store").gather(asked))
    assert np.array_equal(found, features[np.searchsorted(image_ids, asked)])
    body = [line for line in code[code.index("class") :].splitlines() if line]
    assert len(body) <= 25


def test_every_file_that_the_documents_link_is_there():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    links = [
        (page, target)
        for page in pages
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    ]
    assert links
    for page, target in links:
        assert (page.parent / target).exists(), f"{page.name} links {target}"
