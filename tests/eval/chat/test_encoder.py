"""Pictures are encoded as the features of a run were, whatever the tower."""

from types import SimpleNamespace

import numpy as np
import pytest

from cache import FeatureStore
from eval.chat.encoder import RunEncoder
from pipeline.settings import EncoderSettings
from tests.pipeline.conftest import Workspace
from tests.pipeline.towers.conftest import build


@pytest.fixture
def run(tmp_path):
    """A run on features of a tower that crops by transformers' rule, its workspace, and the specs
    that were checked."""
    folder = build("dinov2", tmp_path / "dinov2")
    workspace = Workspace(tmp_path / "workspace", range(1, 6))
    workspace.encoder |= {"model": f"hf:{folder}", "pretrained": "main"}
    workspace.run()
    settings = EncoderSettings(**workspace.encoder)
    params = SimpleNamespace(section=lambda name, cls: settings)
    checked = []
    run = SimpleNamespace(params=params, check_features=lambda spec, where: checked.append(spec))
    return run, workspace, checked


def test_a_picture_of_the_store_gets_its_features_again(run):
    finished, workspace, checked = run
    store = FeatureStore(workspace.features)
    encoder = RunEncoder(finished)
    for image_id in (1, 5):
        found = encoder.encode(workspace.images[image_id], "a picture").astype(np.float32)
        wanted = store.gather([image_id])[0].astype(np.float32)
        # The store's batches are larger.
        assert np.linalg.norm(found - wanted) < 1e-3 * np.linalg.norm(wanted)
    assert checked == [store.spec]
