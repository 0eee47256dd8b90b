"""What the pages say of stages, folders and settings is what is in the files that decide it."""

import itertools
import re

from ruamel.yaml import YAML

from tests.documents.pages import PAGES, ROOT, all_blocks
from tests.settings_law import leaves
from tests.test_pipeline_definition import SECTIONS

DATA = (ROOT / "docs/data.md").read_text()

YAML_FILE = YAML(typ="safe", pure=True)


def rows_below(head):
    lines = DATA[DATA.index(head) :].splitlines()[2:]
    lines = itertools.takewhile(lambda line: line.startswith("|"), lines)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def names_in(cell):
    """The paths of a table's cell, with braces spelt out and patterns as their folder."""
    found = set()
    for name in re.findall(r"`([^`]+)`", cell):
        before, braces, after = (re.match(r"([^{]*)(?:{(.*)})?(.*)", name)).groups()
        names = [before + middle + after for middle in (braces or "").split(",")]
        found |= {re.sub(r"/(\*[^/]*)?$", "", name) for name in names}
    return found


def test_the_table_of_stages_has_every_stage_and_all_that_it_writes():
    stages = YAML_FILE.load(ROOT / "dvc.yaml")["stages"]
    rows = rows_below("| stage | reads | writes |")
    assert [row[0].strip("`") for row in rows] == list(stages)
    for name, _, writes in rows:
        stage = stages[name.strip("`")]
        outputs = [*stage["outs"], *stage.get("metrics", [])]
        paths = {path if isinstance(path, str) else next(iter(path)) for path in outputs}
        assert names_in(writes) == paths, name


def test_every_folder_of_the_tree_is_there_and_every_package_is_in_it():
    (tree,) = (block.text for block in all_blocks("text") if block.text.startswith("cache/"))
    rooms, top = set(), None
    for line in tree.splitlines():
        names = re.findall(
            r"(?<![\w./])([\w/]+)/", line.split("   ")[0] if line.startswith(" ") else line
        )
        if line.startswith(" "):
            rooms |= {f"{top}/{name}" for name in names}
        else:
            rooms |= set(names)
            top = names[0]
    outputs = {"data", "runs", "reports"}
    assert outputs < rooms
    assert [name for name in rooms - outputs if not (ROOT / name).is_dir()] == []
    packages = {
        str(path.parent.relative_to(ROOT))
        for top in rooms & {"cache", "workspace", "pipeline", "train", "eval", "demo", "bench"}
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert packages <= rooms


def test_every_setting_that_the_pages_name_exists():
    settings = {
        tuple(leaf.split(".")[:2]) for n, cls in SECTIONS.items() for leaf in leaves(cls, n)
    }
    named = {
        pair
        for page in PAGES
        for pair in re.findall(r"`([a-z]+)\.([a-z_]+)(?:[:=][^`]*)?`", page.read_text())
        if pair[0] in SECTIONS and pair[1] != "py"
    }
    assert len(named) > 4
    assert named - settings == set()
