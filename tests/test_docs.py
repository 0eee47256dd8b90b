"""The code that the documentation shows must do what it says."""

import re
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]


def test_the_reader_of_the_format_page_reads_a_store(store):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/format.md").read_text(), re.DOTALL)
    namespace: dict[str, type] = {}
    exec(code, namespace)
    asked = np.random.default_rng(1).choice(store.image_ids, 100).tolist()
    found = namespace["Reader"](store.root).gather(asked)
    assert np.array_equal(found, store.gather(asked))
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
