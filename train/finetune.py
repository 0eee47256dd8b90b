"""Stage finetune: projector and LoRA learn to answer; the base language model is frozen."""

from workspace.settings import Params
from workspace.stage import run_stage


def finetune(params: Params) -> None:
    """Train stage 2 and publish its run."""
    # torch takes seconds to import, and `--help` needs none of it.
    from train.stages.conversations import train_on_conversations

    train_on_conversations(params)


if __name__ == "__main__":
    run_stage(finetune, __doc__)
