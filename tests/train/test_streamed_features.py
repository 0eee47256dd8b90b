"""Training on a workspace whose shards stay at a URL gives the weights of a local store."""

import shutil

import pytest

from cache.remote.origin import ORIGIN_FILE, origin_json
from tests.cache.remote.fault_server import FaultServer
from train.pretrain import pretrain


@pytest.mark.slow("trains twice")
def test_training_from_a_url_is_training_from_a_folder(workspace):
    def train():
        pretrain(workspace.params())
        weights = (workspace.root / "runs/pretrain/projector.safetensors").read_bytes()
        for name in ("runs", ".work"):
            shutil.rmtree(workspace.root / name, ignore_errors=True)
        return weights

    wanted = train()
    features, remote = workspace.root / "data/features", workspace.root / "elsewhere"
    shutil.copytree(features, remote)
    for path in features.glob("*.h5"):
        path.unlink()
    server = FaultServer(remote)
    try:
        (features / ORIGIN_FILE).write_bytes(origin_json(server.url))
        assert train() == wanted
    finally:
        server.stop()
    assert not list(features.glob("*.h5"))
