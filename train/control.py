"""Stage control: trains the last stage that has texts again, with the features of other images.

The run learns the same texts in the same order. A question that it answers right needs no picture.
The stage trains only with `controls.trained_blind: true` in params.yaml, and takes as long as the
stage that it repeats; eval.evaluate then scores `runs/control` beside the model.
"""

import os
import shutil

from cache.files.atomic import write_json
from train.settings import CONTROL
from workspace.control_settings import ControlsSettings
from workspace.errors import StageError
from workspace.locks import folder_lock
from workspace.paths import REPORTS, RUNS, UNFINISHED_RUNS
from workspace.settings import Params
from workspace.stage import run_stage

NOT_TRAINED = {"trained_blind": False}
"""Metrics of the stage where it trains nothing; its folder then holds no other file."""


def control(params: Params) -> None:
    """Train the control and publish its run, or publish that there is none."""
    if not params.section("controls", ControlsSettings).trained_blind:
        # Of several processes of torchrun, the first one writes.
        if os.environ.get("RANK", "0") == "0":
            publish_none()
        return
    # torch takes seconds to import.
    from train.data.examples import read_conversation_examples
    from train.stages.captions import train_on_captions
    from train.stages.conversations import train_on_conversations

    has_conversations = any(len(read_conversation_examples(s)) for s in ("train", "holdout"))
    (train_on_conversations if has_conversations else train_on_captions)(params, CONTROL)


def publish_none() -> None:
    """Replace an earlier control by the note that none was trained.

    Raises:
        StageError: A file lies in the place of the run's folder.
    """
    target = RUNS / CONTROL
    with folder_lock(UNFINISHED_RUNS / CONTROL):
        if target.is_symlink():
            target.unlink()
        elif target.is_dir():
            # A folder without settings is no run, so a kill leaves none by half.
            (target / "params.yaml").unlink(missing_ok=True)
            shutil.rmtree(target)
        elif target.exists():
            raise StageError(f"{target}: wanted the folder of a run, found a file. Move it away.")
        write_json(target / "metrics.json", NOT_TRAINED)
        write_json(REPORTS / f"{CONTROL}.json", NOT_TRAINED)
    print(f"{CONTROL}: not trained, because controls.trained_blind is false")


if __name__ == "__main__":
    run_stage(control, __doc__)
