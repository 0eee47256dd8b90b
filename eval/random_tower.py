"""Whether a run saw through a vision tower of random weights, and what is said of it then.

Scores of such a run can beat their controls, since random features tell pictures apart too.
"""

from collections.abc import Mapping
from typing import Any

from eval.settings import shown_setting
from pipeline.settings import RANDOM

WARNING = (
    "The vision tower's weights are random (encoder.pretrained: random): scores say nothing about "
    "a real one."
)


def random_tower_warning(*settings: Mapping[str, Any]) -> str:
    """Return the warning where one of some settings names random weights, and else nothing.

    Args:
        settings: Values of settings files; a section may be absent.
    """
    named = [shown_setting(values, "encoder", "pretrained") for values in settings]
    return WARNING if RANDOM in named else ""
