"""Stage pretrain: the projector learns to caption images, the language model is frozen."""

from workspace.settings import Params
from workspace.stage import run_stage


def pretrain(params: Params) -> None:
    """Train stage 1 and publish its run."""
    # torch takes seconds to import, and `--help` needs none of it.
    from train.stages.captions import train_on_captions

    train_on_captions(params)


if __name__ == "__main__":
    run_stage(pretrain, __doc__)
