"""Writes docs/models.md from the families of language models and the outcomes of their tests.

python -m tests.documents.models_page
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.train.model.families import FAMILIES, Family

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/models.md"

TEST_FILES = ("tests/train/model/test_families.py", "tests/eval/llava/test_model.py")

STAGE_1 = ("test_the_family_is_supported", "test_packed_rows", "test_embedded", "test_generation")
STAGE_2 = (*STAGE_1, "test_lora", "test_a_resumed_run")
NF4 = (*STAGE_2, "test_nf4")
EXPORT = "test_transformers_own_classes"
"""Beginnings of the names of the tests behind a column; each must pass."""

HEAD = """# Language models and towers

`llm.model` is a hub id or a folder in the same layout: any decoder of transformers whose
attention can be replaced through its `AttentionInterface`. Before any work, the stages build a
small random copy of the model, with all rules of its config, and compare packed rows with
transformers' own pass of one sequence a text in float64. A model whose losses or gradients
differ is refused with the reason, and so is one with weight matrices that LoRA would leave out,
like the experts of a mixture.

| family | known models | stage 1 | stage 2 | NF4 | export | note |
|---|---|---|---|---|---|---|
"""

TAIL = """
- **Stage 1, stage 2**: loss and gradients of projector and LoRA equal those of one sequence a
  text (1e-9 in float64), with the family's own windows, scales, soft caps and biases; LoRA is on
  every linear layer of the blocks; generation with a cache gives the tokens of generation
  without; a resumed run equals an uninterrupted one bit for bit.
- **NF4**: loss and gradients are those of the dequantised weights.
- **Export**: `eval.export` writes a folder that `LlavaForConditionalGeneration` loads, with the
  logits of the run from pixels; "own code" needs `trust_remote_code=True`. A factor of the
  logits is multiplied into the output layer. A vocabulary without a free row gets one row for
  the image token.
- Texts longer than a table of learned positions, or than the original limit of "longrope"
  positions, are refused by `max_text_tokens`.

The tests behind the table run on tiny random models; `python -m tests.documents.models_page`
runs them and makes this page. Real weights of Phi-2's size and of these families were not
trained here, but for what [the ladder](data.md#a-ladder-of-whole-runs) names.

`make demo LLM=llama` runs the demo with a tiny Llama and the chat template of its tokenizer,
trained on the same texts as the demo's Phi. `params.yaml` names it from then on;
`git checkout params.yaml` goes back. `llm.prompt` decides which tokens stand around questions
([prompts](training.md#prompts)).

`encoder.model` names the vision tower: an architecture of open_clip, `hf:` and a vision model of
transformers, or `timm:` and a convolutional network; see [towers](data.md#another-vision-tower).
"""


def render(passes: Callable[[str, str], bool]) -> str:
    """Return the page.

    Args:
        passes: Whether all tests whose names begin so pass for a family.
    """

    def cell(family: str, tests: tuple[str, ...]) -> str:
        return "yes" if all(passes(family, test) for test in tests) else "no"

    def row(family: Family) -> str:
        export = family.export
        if export == "yes":
            export = cell(family.kind, (EXPORT,))
        columns = [
            family.kind,
            family.models,
            *(cell(family.kind, tests) for tests in (STAGE_1, STAGE_2, NF4)),
            export,
            family.note,
        ]
        return f"| {' | '.join(columns)} |\n"

    return HEAD + "".join(map(row, FAMILIES.values())) + TAIL


class Outcomes:
    """A plugin of pytest that notes which tests passed."""

    def __init__(self) -> None:
        self.outcomes: dict[str, bool] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a test's outcome, that of its set-up included."""
        name = report.nodeid.rpartition("::")[2]
        self.outcomes[name] = self.outcomes.get(name, True) and report.passed

    def passes(self, family: str, test: str) -> bool:
        """Return whether there are such tests of a family, and all of them passed."""
        found = [
            passed
            for name, passed in self.outcomes.items()
            if name.startswith(test) and f"[{family}]" in name
        ]
        return bool(found) and all(found)


def main() -> None:
    """Run the tests and write the page."""
    noted = Outcomes()
    pytest.main(["-q", "-p", "no:cacheprovider", *TEST_FILES], plugins=[noted])
    PAGE.write_text(render(noted.passes))


if __name__ == "__main__":
    main()
