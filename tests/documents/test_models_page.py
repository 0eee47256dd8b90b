"""docs/models.md says what the tests of the families show."""

import re

from tests.documents.models_page import EXPORT, NF4, PAGE, ROOT, TEST_FILES, Outcomes, render
from tests.train.model.families import FAMILIES


def test_the_page_is_that_of_tests_that_all_pass():
    assert PAGE.read_text() == render(lambda family, test: True)


def test_every_column_has_tests():
    names = re.findall(
        r"^def (test_\w+)", "".join((ROOT / f).read_text() for f in TEST_FILES), re.M
    )
    for test in (*NF4, EXPORT):
        assert sum(name.startswith(test) for name in names) == 1, test


def test_a_failed_or_missing_test_is_a_no():
    noted = Outcomes()
    for name in (*NF4, EXPORT):
        for family in FAMILIES:
            noted.outcomes[f"{name}_of_a_law[{family}]"] = True
    assert render(noted.passes) == PAGE.read_text()
    noted.outcomes["test_nf4_of_a_law[Llama]"] = False
    (line,) = (line for line in render(noted.passes).splitlines() if line.startswith("| Llama "))
    assert "| yes | yes | no |" in line
    del noted.outcomes["test_lora_of_a_law[Qwen3]"]
    (line,) = (line for line in render(noted.passes).splitlines() if line.startswith("| Qwen3 "))
    assert "| yes | no | no |" in line
