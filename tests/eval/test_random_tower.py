import pytest

from eval.random_tower import WARNING, random_tower_warning
from pipeline.settings import RANDOM
from workspace.settings import parse_yaml

REAL = {"encoder": {"pretrained": "openai"}}


def test_one_of_several_settings_is_enough():
    settings = parse_yaml("encoder: {model: ViT-B-32, pretrained: random}", "here")
    assert settings["encoder"]["pretrained"] == RANDOM
    for all_settings in ([settings], [settings, REAL], [REAL, {}, settings]):
        assert random_tower_warning(*all_settings) == WARNING


@pytest.mark.parametrize(
    "encoder", [None, 5, "random", ["random"], {}, {"model": "random"}, {"pretrained": "Random"}]
)
def test_nothing_else_is_a_tower_of_random_weights(encoder):
    assert random_tower_warning({"encoder": encoder}, REAL, {}) == ""
