"""Stage finetune: projector and LoRA learn to answer; the base language model is frozen."""

from train.stages.conversations import train_on_conversations
from workspace.settings import Params
from workspace.stage import run_stage


def finetune(params: Params) -> None:
    """Train stage 2 and publish its run."""
    train_on_conversations(params)


if __name__ == "__main__":
    run_stage(finetune, __doc__)
