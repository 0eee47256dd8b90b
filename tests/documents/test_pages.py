"""What README.md and docs/ show must be so: every block is run, or listed with a reason and parsed.

The blocks of some sections are run by the modules that look closer at what they do.
"""

import re
import zipfile

import numpy as np
import pytest

from tests.documents.commands import can_be_started, check_line
from tests.documents.pages import NOT_RUN, PAGES, ROOT, all_blocks, run_commands, run_python
from workspace.data_settings import DataSettings
from workspace.settings import Params

pytestmark = pytest.mark.slow("runs the commands of README and docs/")

ELSEWHERE = {
    "Experiments": "test_everyday_use",
    "Features": "test_everyday_use",
    "Sharing features": "test_sharing",
    "Your own images and texts": "test_own_data",
    "The Hugging Face Hub": "test_hub_page",
}
"""Heading of a section to the module that runs its shell blocks, in order."""

STORIES = ROOT / "docs/own_data.md"
"""The page whose blocks `test_own_data` runs."""

OWN_FEATURES = "Features of your own"
"""Heading of the section whose code `test_own_features` runs."""

BLOCKS = [
    block
    for block in all_blocks("sh", "python")
    if block.heading != OWN_FEATURES and block.page != STORIES
    if block.language == "python" or (block.heading not in ELSEWHERE and block.runnable)
]
"""In order: the code that loads an export stands behind the command that makes it."""


@pytest.fixture(scope="module")
def words(checkout, world) -> dict[str, str]:
    """What stands for a reader's own files."""
    with zipfile.ZipFile(world / "val2017.zip") as archive:
        picture = archive.extract(archive.namelist()[0], checkout.parent)
    return {
        "photo.jpg": picture,
        "3021": "61",
        "file:///mnt/team/features": f"file://{checkout.parent}/team/features",
        "s3://bucket/features": (checkout / "data/features").as_uri(),
        "/scratch/shards": str(checkout.parent / "shards"),
        "OUT": str(checkout.parent / "exported"),
        "data/raw/annotations/captions_val2017.json": str(
            world / "annotations/captions_val2017.json"
        ),
    }


def test_every_block_says_what_it_is():
    blocks = [block for page in PAGES for block in all_blocks("", "sh", "python", "text", "yaml")]
    assert {block.language for block in blocks} == {"sh", "python", "text", "yaml"}
    fences = sum(len(re.findall(r"^```", page.read_text(), re.M)) for page in PAGES)
    assert fences == 2 * len(all_blocks("sh", "python", "text", "yaml"))


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.text.split("\n")[0])
def test_a_block_runs_as_written(checkout, words, block):
    if block.language == "python":
        run_python(block.text, checkout, words)
    else:
        run_commands(block.runnable, checkout, words)


def test_a_section_of_settings_fits_its_class(tmp_path):
    (block,) = all_blocks("yaml")
    (tmp_path / "my.yaml").write_text(block.text)
    assert Params.read(tmp_path / "my.yaml").section("data", DataSettings).source == "local"


def test_a_section_that_is_run_elsewhere_is_there():
    headings = {block.heading for block in all_blocks("sh")}
    assert ELSEWHERE.keys() < headings
    assert all((ROOT / f"tests/documents/{module}.py").exists() for module in ELSEWHERE.values())


@pytest.mark.parametrize("command", NOT_RUN)
def test_a_command_that_is_not_run_is_in_the_pages_and_can_be_parsed(monkeypatch, command):
    assert [block for block in all_blocks("sh") if command in block.commands]
    check_line(monkeypatch, command)


def test_every_module_that_the_pages_name_can_be_started():
    modules = {
        name
        for page in PAGES
        for name in re.findall(r"python -m ([a-z]\w*\.[\w.]+)", page.read_text())
    }
    assert {"cache.verify", "eval.ask", "pipeline.extract"} < modules
    assert [module for module in modules if not can_be_started(module)] == []


def test_the_reader_of_the_format_page_reads_a_store(store):
    (block,) = (block for block in all_blocks("python") if block.page.name == "format.md")
    namespace: dict[str, type] = {}
    exec(block.text, namespace)
    asked = np.random.default_rng(1).choice(store.image_ids, 100).tolist()
    found = namespace["Reader"](store.root).gather(asked)
    assert np.array_equal(found, store.gather(asked))
    code = block.text[block.text.index("class") :]
    assert len([line for line in code.splitlines() if line]) <= 25


def test_every_file_that_the_pages_link_is_there():
    links = [
        (page, target)
        for page in PAGES
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    ]
    assert links
    for page, target in links:
        assert (page.parent / target).exists(), f"{page.name} links {target}"
