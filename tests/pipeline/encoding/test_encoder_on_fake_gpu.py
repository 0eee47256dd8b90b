"""The vision tower on fake tensors of a GPU: devices, dtypes, and where the host would wait."""

import pytest
import torch

from pipeline.encoding.encoder import Encoder, load_encoder, patch_tokens
from tests.stand_in_gpu.fake import DEVICE, FakeGpu

pytestmark = [
    pytest.mark.stand_in_gpu,
    pytest.mark.slow(reason="a process of its own that loads torch and open_clip"),
]


@pytest.fixture
def gpu():
    return FakeGpu()


@pytest.fixture
def make_fake_encoder(gpu, settings, monkeypatch):
    def make(precision="bf16"):
        on_cpu = load_encoder(settings(precision=precision, device="cpu"))
        visual = on_cpu._visual
        dtypes = {parameter.dtype for parameter in visual.parameters()}

        def to(device, dtype):
            assert (device, {dtype}) == (DEVICE, dtypes)
            return gpu.move(visual)

        # Fake parameters refuse to be moved by torch.
        monkeypatch.setattr(visual, "to", to)
        with gpu.running():
            return Encoder(visual, on_cpu.spec, DEVICE)

    return make


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_images_are_encoded_on_the_gpu_and_copied_back(gpu, make_fake_encoder, precision):
    encoder = make_fake_encoder(precision)
    side = encoder.spec.image_size
    with gpu.running() as host:
        pending = encoder.submit(torch.zeros(3, side, side, 3, dtype=torch.uint8))
    assert pending.features_BPD.device.type == pending.is_finite.device.type == "cpu"
    assert pending.features_BPD.dtype == torch.float16
    assert pending.features_BPD.shape == (3, encoder.spec.patches, encoder.spec.width)
    assert pending.is_finite.dtype == torch.bool
    assert pending.copied is not None
    assert host.waits == []


@pytest.mark.parametrize(("precision", "may_use_tf32"), [("bf16", True), ("fp32", False)])
def test_float32_patches_are_not_multiplied_in_tf32(
    make_fake_encoder, monkeypatch, precision, may_use_tf32
):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    make_fake_encoder(precision)
    assert torch.backends.cudnn.allow_tf32 == may_use_tf32


def test_pixels_that_were_left_on_the_cpu_are_found(gpu, make_fake_encoder):
    encoder = make_fake_encoder()
    side = encoder.spec.image_size
    with gpu.running(), pytest.raises(RuntimeError, match="device"):
        patch_tokens(encoder._visual, torch.zeros(3, 3, side, side, dtype=torch.bfloat16), -1)
