"""What has changed since the runs were trained, and is said of their scores then.

None of it makes an evaluation impossible: a run may be scored on new texts, or in another
precision. But an index that was made anew may count images as held out that a run learned from.
"""

from collections.abc import Mapping
from typing import Any

from eval.settings import shown_setting
from train.provenance import changed_tables

PRECISION = ("quantize", "dtype")
"""Settings of section llm in which a run may be scored otherwise than it was trained."""


def changed_inputs_warning(
    settings: Mapping[str, Any],
    run_settings: Mapping[str, Mapping[str, Any]],
    provenances: Mapping[str, Mapping[str, Any]],
) -> str:
    """Return one sentence for each change, or nothing.

    Args:
        settings: Values of the settings of this evaluation.
        run_settings: Those of each stage's run, as they were when it began.
        provenances: The provenance of each stage's run.
    """
    sentences = []
    for stage, provenance in provenances.items():
        if changed := changed_tables(provenance):
            sentences.append(
                f"{' and '.join(changed)} changed after {stage} was trained: images that it "
                f"learned from may count as held out."
            )
        for name in PRECISION:
            here, there = (
                shown_setting(values, "llm", name) for values in (settings, run_settings[stage])
            )
            if here != there:
                sentences.append(f"llm.{name} is {here}, but {stage} was trained with {there}.")
    return " ".join(sentences)
