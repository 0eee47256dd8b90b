"""Stage control: trains the last stage that has texts again, with the features of other images.

The run learns the same texts in the same order, without sight. What it answers right, the picture
is not needed for. It is trained only with `controls.trained_blind: true`.
"""

import os
import shutil

from cache.files.atomic import write_json
from train.settings import CONTROL
from workspace.control_settings import ControlsSettings
from workspace.locks import folder_lock
from workspace.paths import REPORTS, RUNS, UNFINISHED_RUNS
from workspace.settings import Params
from workspace.stage import run_stage

NOT_TRAINED = {"trained_blind": False}
"""Metrics of the stage where it trains nothing; its folder then holds no other file."""


def control(params: Params) -> None:
    """Train the control and publish its run, or publish that there is none."""
    if not params.section("controls", ControlsSettings).trained_blind:
        publish_none()
        return
    # torch takes seconds to import.
    from train.data.examples import read_conversation_examples
    from train.stages.captions import train_on_captions
    from train.stages.conversations import train_on_conversations

    has_conversations = any(len(read_conversation_examples(s)) for s in ("train", "holdout"))
    (train_on_conversations if has_conversations else train_on_captions)(params, CONTROL)


def publish_none() -> None:
    """Replace an earlier control by the note that none was trained."""
    unfinished, target = UNFINISHED_RUNS / CONTROL, RUNS / CONTROL
    with folder_lock(unfinished):
        replaced = unfinished / "replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        if target.exists():
            # Moved, then deleted: half a run is never visible.
            os.replace(target, replaced)
        write_json(target / "metrics.json", NOT_TRAINED)
        write_json(REPORTS / f"{CONTROL}.json", NOT_TRAINED)
        shutil.rmtree(replaced, ignore_errors=True)
    print(f"{CONTROL}: not trained, because controls.trained_blind is false")


if __name__ == "__main__":
    run_stage(control, __doc__)
