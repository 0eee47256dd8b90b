"""docs/patchcache.ipynb is a notebook; its commands, files and settings are the project's."""

import ast
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from tests.documents.commands import check_line
from tests.documents.pages import ROOT, run_python
from tests.test_pipeline_definition import SECTIONS
from workspace.settings import Params

PAGE = ROOT / "docs/patchcache.ipynb"
NOTEBOOK = json.loads(PAGE.read_text())
CELLS = {cell["id"]: cell for cell in NOTEBOOK["cells"]}
CODE = {name: "".join(c["source"]) for name, c in CELLS.items() if c["cell_type"] == "code"}
PROSE = "\n".join("".join(c["source"]) for c in CELLS.values() if c["cell_type"] == "markdown")

IN_VENV = "%%script .venv/bin/python\n"
"""First line of a cell that runs in the project's Python, not in the notebook's."""

MADE = ("data/", "runs/", "reports/", ".work/", ".venv/")
"""Folders that do not exist before the demo."""


def python(name):
    return CODE[name].removeprefix(IN_VENV)


def nodes():
    for name in CODE:
        yield from ast.walk(ast.parse(python(name)))


def text_of(node):
    """A string as written, with a sign in the place of each value; None of anything else."""
    if isinstance(node, ast.JoinedStr):
        return "".join(
            part.value if isinstance(part, ast.Constant) else "…" for part in node.values
        )
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def commands():
    """What the notebook gives to `run`."""
    calls = [n for n in nodes() if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "run"]
    return {text_of(call.args[0]) for call in calls} | set(
        re.findall(r'^run\("(.*)"\)$', PROSE, re.M)
    )


def test_the_fields_are_those_of_nbformat_4_5():
    assert NOTEBOOK.keys() == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert NOTEBOOK["metadata"]["kernelspec"].keys() >= {"name", "display_name"}
    assert len(CELLS) == len(NOTEBOOK["cells"])
    of_all = {"cell_type", "id", "metadata", "source"}
    for name, cell in CELLS.items():
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name)
        of_code = {"execution_count", "outputs"} if name in CODE else set()
        assert cell["cell_type"] == ("code" if name in CODE else "markdown")
        assert cell.keys() == of_all | of_code


def test_no_output_is_kept():
    assert [n for n in CODE if CELLS[n]["outputs"] or CELLS[n]["execution_count"]] == []


@pytest.mark.parametrize("name", CODE)
def test_a_cell_is_python(name):
    assert not re.search("^[%!]", python(name), re.M)
    ast.parse(python(name))


def test_every_command_can_be_checked(monkeypatch):
    found = commands()
    assert {"make demo", "cp .work/t4.yaml params.yaml && dvc repro"} <= found
    for command in found:
        line = re.sub(r" \|\| echo .*", "", command)
        if line.startswith("cp .work/t4.yaml"):
            line = line.partition(" && ")[2]
        if not line.startswith("python -c"):
            check_line(monkeypatch, line)


def test_every_file_is_in_the_checkout_or_made_by_the_demo():
    paths = {
        path
        for text in filter(None, map(text_of, nodes()))
        for path in re.findall(r"(?<![\w/.{}])[\w.-]+/[\w./-]*\w", text)
        if not path.startswith("val2017/")
    }
    assert {"cache/store.py", "configs/coco.yaml", "data/features", "runs/finetune"} <= paths
    missing = [p for p in paths if not p.startswith(MADE) and not (ROOT / p).exists()]
    assert missing == []


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\(([^)#:]+)(?:#([\w-]+))?\)", PROSE)
    assert links
    for target, heading in links:
        text = (PAGE.parent / target).read_text().lower()
        assert not heading or f"# {heading}\n" in text, f"{target}#{heading}"


def test_the_figures_are_those_of_the_page_about_gpus():
    page = (ROOT / "docs/gpu.md").read_text()
    assert "take 1.8 GB in NF4 and 5.6 GB" in " ".join(page.split())
    assert "takes 1.8 GB instead of 5.6" in PROSE
    assert "| stage 2 | 140,000 | 4.5 |" in page
    assert "keeps 4.5 MB a position" in PROSE
    assert "never ran on a GPU" in PROSE


@pytest.fixture
def namespace(monkeypatch, tmp_path):
    """The names of the first cell, run in docs/."""
    monkeypatch.chdir(ROOT / "docs")
    names: dict[str, object] = {}
    exec(python("checkout"), names)
    return names


def test_the_notebook_finds_the_checkout_that_it_lies_in(namespace):
    assert Path.cwd() == ROOT


def test_the_notebook_clones_the_repository_elsewhere(monkeypatch, tmp_path):
    elsewhere = tmp_path / "content"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "git").write_text('#!/bin/sh\nmkdir "$4" && echo "$3" > "$4/cloned"\n')
    (tmp_path / "git").chmod(0o755)
    cell = python("checkout").replace('REPOSITORY = ""', 'REPOSITORY = "host:repository"')
    exec(cell, {})
    assert Path.cwd() == elsewhere / "patchcache"
    assert Path("cloned").read_text() == "host:repository\n"


def test_a_command_is_shown_and_stops_the_notebook_when_it_fails(namespace, capsys):
    namespace["run"]("echo out; echo err >&2")
    assert capsys.readouterr().out == "out\nerr\n"
    with pytest.raises(RuntimeError, match=r"exit code 3: exit 3"):
        namespace["run"]("exit 3")


def test_the_scores_are_those_of_the_reports(monkeypatch, tmp_path, capsys):
    reports = json.loads((ROOT / "bench/results/demo.json").read_text())["reports"]
    (tmp_path / "reports").mkdir()
    for name, report in reports.items():
        (tmp_path / f"reports/{name}.json").write_text(json.dumps(report))
    monkeypatch.chdir(tmp_path)
    exec(python("scores"), {"Path": Path})
    shown = capsys.readouterr().out
    for score in (reports["eval"]["captions"], reports["eval"]["captions"]["blind"]):
        assert f"{score['CIDEr']:.3f}" in shown
    assert f"{reports['finetune']['seconds']:.0f} s" in shown


def test_four_lines_read_the_features():
    lines = [line for line in python("features").splitlines() if line]
    assert len(lines) == 4
    assert CODE["features"].startswith(IN_VENV)


@pytest.mark.slow("reads a store that the pipeline made")
def test_the_lines_that_read_the_features_run(checkout):
    run_python(python("features"), checkout, {"3021": "61", "3001": "62"})


def test_the_settings_of_a_small_card_are_valid_and_those_of_the_table(monkeypatch, tmp_path):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / ".work").mkdir()
    monkeypatch.chdir(tmp_path)
    exec(python("t4"), {})
    made = Params.read(tmp_path / ".work/t4.yaml")
    for name, section in SECTIONS.items():
        made.section(name, section)
    rows = re.findall(r"^\| `(?:(\w+)\.)?(\w+)`.*?\| `(\w+)` \|", PROSE, re.M)
    assert len(rows) == 5
    for section, key, value in rows:
        found = made.values[section or "finetune"][key]
        assert str(found).lower() == value, key
