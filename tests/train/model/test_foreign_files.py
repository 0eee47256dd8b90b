import pytest

from tests.train.model.foreign_files import ForeignFiles

CASES = 320


@pytest.fixture(scope="module")
def files(phi_dir, tmp_path_factory):
    return ForeignFiles(phi_dir, tmp_path_factory.mktemp("foreign"))


@pytest.mark.parametrize("part", range(4))
def test_damaged_files_are_loaded_or_refused_in_one_line(files, part, capfd):
    wrong, outcomes = {}, set()
    for seed in range(part * CASES // 4, (part + 1) * CASES // 4):
        outcome = files.outcome(*files.damaged(seed))
        outcomes.add(outcome)
        if outcome not in ("loaded", "refused"):
            wrong[seed] = outcome
    assert not wrong
    assert outcomes == {"loaded", "refused"}
    assert "panicked" not in capfd.readouterr().err
