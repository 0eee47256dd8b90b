"""A comment changes no stage's code, a statement that of exactly the stages that import it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cache.errors import SettingsError
from pipeline import code as module
from pipeline.code import FILES, STAGES
from tests.checkout import ROOT
from workspace import code_hash as hashing
from workspace.code_hash import PACKAGES, code_hash, modules_of
from workspace.settings import Params

pytestmark = pytest.mark.slow("parses the whole project for each test")

SOURCE = (
    '"""Says what it is."""\n\nLIMIT = 3\n"""Most of them."""\n\ndef double(x):\n    return 2 * x\n'
)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the code in which a test may change any file, as the working directory."""
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "checkpoints")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(hashing, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(project: Path, **sections: dict[str, object]) -> dict[str, str]:
    module.code(Params(Path("params.yaml"), "", sections))
    return {path.name: path.read_text() for path in (project / "data/code").iterdir()}


def changed_stages(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {stage for stage in STAGES if before[stage] != after[stage]}


@pytest.mark.parametrize(
    "same",
    [
        SOURCE + "# The end.\n",
        SOURCE.replace("what it is", "something else"),
        SOURCE.replace('"""Most of them."""\n', ""),
        SOURCE.replace("2 * x", "(\n        2  # twice\n        * x\n    )"),
        SOURCE.replace("def double(x):", 'def double(x):\n    """Double."""'),
    ],
)
def test_comments_docstrings_and_layout_do_not_count(tmp_path, same):
    (tmp_path / "a.py").write_text(SOURCE)
    (tmp_path / "b.py").write_text(same)
    assert code_hash(tmp_path / "a.py") == code_hash(tmp_path / "b.py")


@pytest.mark.parametrize(
    "other",
    [
        SOURCE.replace("3", "4"),
        SOURCE.replace("3", "3.0"),
        SOURCE.replace("3", '"3"'),
        SOURCE.replace("3", "None"),
        SOURCE.replace("2 * x", "x * 2"),
        SOURCE.replace("double", "triple"),
        SOURCE.replace("def double(x)", "def double(x, *, y=0)"),
        SOURCE + "del double\n",
    ],
)
def test_every_other_change_counts(tmp_path, other):
    (tmp_path / "a.py").write_text(SOURCE)
    (tmp_path / "b.py").write_text(other)
    assert code_hash(tmp_path / "a.py") != code_hash(tmp_path / "b.py")


def test_a_comment_in_every_module_changes_no_stage(project):
    before = written(project)
    for path in project.rglob("*.py"):
        path.write_text(path.read_text() + "\n# A remark.\n")
    assert written(project) == before


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("cache/plan.py", set(STAGES)),
        ("pipeline/encoding/encoder.py", {"extract"}),
        ("pipeline/images/decode.py", {"index", "extract", "evaluate"}),
        ("train/pretrain.py", {"pretrain"}),
        ("train/control.py", {"control"}),
        ("train/stages/captions.py", {"pretrain", "control"}),
        ("train/loop/loop.py", {"pretrain", "finetune", "control"}),
        ("eval/report/page.py", {"evaluate"}),
        ("demo/draw.py", {"fetch"}),
        ("eval/serve.py", set()),
    ],
)
def test_a_statement_changes_the_stages_that_import_its_module(project, name, stages):
    before = written(project)
    path = project / name
    path.write_text(path.read_text() + "\nCHANGED = True\n")
    assert changed_stages(before, written(project)) == stages


def test_the_switch_of_a_section_that_may_be_absent_counts_for_its_stage(project):
    before = written(project)
    assert written(project, controls={"trained_blind": False}) == before
    after = written(project, controls={"trained_blind": True})
    assert changed_stages(before, after) == {"control"}
    with pytest.raises(SettingsError, match=r"controls\.trained_blind"):
        written(project, controls={"trained_blind": "yes"})


def test_a_new_import_is_followed_without_anybody_listing_it(project):
    (project / "pipeline/fresh.py").write_text("LIMIT = 1\n")
    path = project / "pipeline/indexing/pope.py"
    path.write_text(
        path.read_text() + "\n\ndef late():\n    from .. import fresh\n    return fresh\n"
    )
    before = written(project)
    assert "pipeline/fresh.py" in before["index"]
    (project / "pipeline/fresh.py").write_text("LIMIT = 2\n")
    assert changed_stages(before, written(project)) == {"index"}


@pytest.mark.parametrize("stage", sorted(FILES))
def test_the_files_that_code_reads_count(project, stage):
    before = written(project)
    found = [path for pattern in FILES[stage] for path in project.glob(pattern)]
    assert len(found) > len(FILES[stage])
    for path in found:
        assert f"  {path.relative_to(project)}\n" in before[stage]
    found[0].write_bytes(found[0].read_bytes() + b" ")
    assert changed_stages(before, written(project)) == {stage}


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_no_module_that_a_stage_really_imports_is_left_out(stage):
    program = (
        f"import sys, {STAGES[stage][0]}\n"
        f"for name, module in list(sys.modules.items()):\n"
        f"    if name.split('.')[0] in {PACKAGES!r}:\n"
        f"        print(module.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    imported = {Path(line) for line in done.stdout.splitlines()}
    assert imported
    assert imported <= modules_of(STAGES[stage])


def test_every_stage_has_a_file_of_readable_lines(project):
    files = written(project)
    assert files.keys() == STAGES.keys()
    for stage, modules in STAGES.items():
        lines = [line.split("  ") for line in files[stage].splitlines() if "  " in line]
        assert all(len(digest) == 64 and (project / name).is_file() for digest, name in lines)
        assert f"{modules[0].replace('.', '/')}.py" in [name for _, name in lines]
