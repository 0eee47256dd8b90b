"""Every setting of the encoder and of extract changes the store, or nothing at all."""

import copy
import json

import pytest

from cache.errors import PatchcacheError
from pipeline.settings import EncoderSettings, ExtractSettings
from tests.pipeline.conftest import TINY
from tests.settings_law import ODD_NUMBERS, leaves

pytestmark = [
    pytest.mark.slow("encodes once for each setting"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

CHANGES = {
    "encoder.model": "wider.json",
    "encoder.pretrained": "weights.pt",
    "encoder.layer": -1,
    "encoder.precision": "bf16",
    "encoder.batch_size": 5,
    "extract.shard_rows": 2,
    "extract.max_failure_rate": 0.5,
}
"""A value of each setting that is not the one of `tests/pipeline/conftest.py`."""

CHANGES_NOTHING = {"extract.workers": 1, "extract.engine": "ray"}
"""Settings that must not change a byte of the store."""

BAD_IMAGE = 7
NUMBERS = [
    (leaf, value)
    for name, cls in (("encoder", EncoderSettings), ("extract", ExtractSettings))
    for leaf, wanted in leaves(cls, name).items()
    for value in ODD_NUMBERS.get(wanted, ())
]


@pytest.fixture
def observe(make_workspace):
    """Extract four images with a setting changed; return the store, or the error."""

    def run(leaf=None, value=None):
        section, _, name = (leaf or "").partition(".")
        images = [1, 2, 3, 4]
        workspace = make_workspace(f"{leaf} {value}", images)
        if leaf:
            setattr(workspace, section, getattr(workspace, section) | {name: value})
        if name == "max_failure_rate":
            workspace.images[BAD_IMAGE] = b"no picture"
        workspace.root.mkdir()
        wider = copy.deepcopy(TINY)
        wider["vision_cfg"]["width"] = 96
        (workspace.root / "wider.json").write_text(json.dumps(wider))
        if value == "weights.pt":
            import torch
            from open_clip.model import CLIP

            torch.manual_seed(5)
            torch.save(CLIP(**TINY).state_dict(), workspace.root / "weights.pt")
        try:
            workspace.run()
        except PatchcacheError as error:
            return str(error)
        return workspace.store_bytes()

    return run


@pytest.mark.parametrize("leaf", CHANGES)
def test_a_setting_changes_the_store(observe, leaf):
    changed = observe(leaf, CHANGES[leaf])
    assert isinstance(changed, dict), changed
    usual = observe("extract.max_failure_rate", 0) if leaf.endswith("rate") else observe()
    assert changed != usual, "the setting is not wired to anything"


@pytest.mark.parametrize("leaf", CHANGES_NOTHING)
def test_a_setting_changes_no_byte(observe, leaf):
    assert observe(leaf, CHANGES_NOTHING[leaf]) == observe()


@pytest.mark.parametrize(("leaf", "value"), NUMBERS)
def test_an_odd_number_is_refused_by_name_or_works(observe, leaf, value):
    found = observe(leaf, value)
    if isinstance(found, str):
        assert "\n" not in found
        assert leaf.partition(".")[2] in found
