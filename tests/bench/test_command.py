import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from bench import command
from bench.command import benchmark_parser, run_benchmark

pytestmark = pytest.mark.slow("starts every benchmark")

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(
    path.stem for path in (ROOT / "bench").glob("*.py") if "__main__" in path.read_text()
)
PARTS = {"opening", "first_step", "make_phi2"}
"""Commands that compare nothing: two parts of others, and what one of them needs."""
BENCHMARKS = [name for name in COMMANDS if name not in PARTS]
WITHOUT_QUICK = {"gpu"}
"""A benchmark whose small sizes are asked for by --dry-run."""
RESULTS = {path.stem for path in (ROOT / "bench/results").glob("*.json")}


def outcome(monkeypatch, capsys, main, *arguments):
    """Run a command's `main`, which must end the process; return its exit code and stdout."""
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, capsys.readouterr().out


@pytest.fixture
def results(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", COMMANDS)
def test_help_describes_a_command_and_measures_nothing(monkeypatch, capsys, name):
    module = importlib.import_module(f"bench.{name}")
    for work in ("measure", "run", "write_phi", "opened"):
        monkeypatch.setattr(module, work, lambda *_: pytest.fail("it was started"), raising=False)
    code, stdout = outcome(monkeypatch, capsys, module.main, "--help")
    assert code == 0
    assert module.__doc__.splitlines()[0] in stdout
    if name in BENCHMARKS and name not in WITHOUT_QUICK:
        assert "--quick" in stdout
        assert re.search(r"takes about \d+ min on two cores \(--quick: \d+ s\)", stdout)


def test_every_result_file_is_made_by_a_benchmark_of_make_bench():
    made = re.findall(r"python -m bench\.(\w+)", (ROOT / "Makefile").read_text())
    assert sorted(made) == BENCHMARKS
    assert RESULTS
    assert [name for name in RESULTS if not name.startswith(tuple(made))] == []


def run(monkeypatch, capsys, measure, *arguments):
    def main():
        parser = benchmark_parser("What it does.")
        run_benchmark(
            "toy", measure, parser, minutes=3, quick_seconds=5, libraries=("numpy", "no library")
        )

    return outcome(monkeypatch, capsys, main, *arguments)


def test_a_benchmark_says_how_long_it_takes_before_it_measures(monkeypatch, capsys, results):
    def measure(arguments):
        assert capsys.readouterr().out == "toy: takes about 3 min on two cores (--quick: 5 s)\n"
        return {"quick": arguments.quick}

    assert run(monkeypatch, capsys, measure)[0] == 0
    written = json.loads((results / "toy.json").read_text())
    assert written["quick"] is False
    assert written["versions"]["no library"] == "not installed"
    assert {"processor", "torch_instructions", "onednn_instructions"} <= written["machine"].keys()


def test_quick_writes_no_result_file(monkeypatch, capsys, results):
    code, stdout = run(monkeypatch, capsys, lambda arguments: {"q": arguments.quick}, "--quick")
    assert code == 0
    assert "no result file" in stdout
    assert list(results.iterdir()) == []


@pytest.mark.parametrize("name", ["order", "verify"])
def test_a_quick_run_prints_the_table_of_the_whole_benchmark(monkeypatch, capsys, results, name):
    module = importlib.import_module(f"bench.{name}")
    code, stdout = outcome(monkeypatch, capsys, module.main, "--quick")
    assert code == 0
    assert re.search(rf"^{name}: (one epoch|median seconds)", stdout, re.M)
    assert list(results.iterdir()) == []


@pytest.mark.parametrize(("instructions", "name"), [("AVX512", "demo"), ("AVX2", "demo_avx2")])
def test_the_demo_has_a_result_file_for_each_kind_of_processor(
    monkeypatch, capsys, results, instructions, name
):
    demo = importlib.import_module("bench.demo")
    monkeypatch.setattr(demo, "measure", lambda _: {})
    monkeypatch.setattr(demo.torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    assert outcome(monkeypatch, capsys, demo.main)[0] == 0
    (path,) = results.iterdir()
    assert path.stem == name
    assert json.loads(path.read_text())["machine"]["torch_instructions"] == instructions
