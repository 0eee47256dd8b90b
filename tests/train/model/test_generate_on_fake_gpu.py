"""Generation on fake tensors of a GPU: devices, dtypes, and where the host waits."""

import numpy as np
import pytest
import torch

from tests.conftest import WIDTH
from tests.stand_in_gpu.fake import DEVICE, FakeGpu
from tests.stand_in_gpu.models import ARCHITECTURES
from train.model.captioner import CaptionModel
from train.model.generate import Sampling, _config, _continue, _prompt_embeds
from train.model.projector import seeded_projector

pytestmark = [
    pytest.mark.stand_in_gpu,
    pytest.mark.slow(reason="a process of its own that loads torch and transformers"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]

PATCHES_BPD = np.zeros((3, 4, WIDTH), np.float16)
PROMPT_IDS = [[], [5], [6, 7, 8]]
LEAD = (4, 3)
SAMPLED = Sampling(temperature=0.7, top_p=0.9, seed=0)


@pytest.fixture
def gpu():
    return FakeGpu()


@pytest.fixture
def make_fake_model(gpu):
    def make(architecture="phi", dtype=torch.bfloat16):
        language_model = ARCHITECTURES[architecture]().to(dtype).eval().requires_grad_(False)
        projector = seeded_projector("mlp", WIDTH, language_model.config.hidden_size, 0)
        with gpu.running():
            return CaptionModel(gpu.move(projector), gpu.move(language_model)).eval()

    return make


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("sampling", [None, SAMPLED])
def test_texts_are_generated_on_the_gpu_with_one_wait_a_token(
    gpu, make_fake_model, prompt_format, architecture, dtype, sampling
):
    model = make_fake_model(architecture, dtype)
    config = _config(model, prompt_format, 9, sampling)
    num_tokens, waits = [], []
    # Transformers asks a few questions first, and after each token whether all texts have ended.
    for patience in (5, 7):
        with gpu.running(patience) as host:
            token_ids = _continue(model, PATCHES_BPD, PROMPT_IDS, config, sampling, LEAD)
        assert (token_ids.device, token_ids.dtype) == (DEVICE, torch.int64)
        assert len(token_ids) == len(PROMPT_IDS)
        num_tokens.append(token_ids.shape[1])
        waits.append(host.waits)
    assert waits[0][:2] == ["copy from cpu to cuda"] * 2
    assert set(waits[0][2:]) == {"value of torch.bool"}
    assert num_tokens[1] - num_tokens[0] == 2
    assert waits[1] == waits[0] + ["value of torch.bool"] * 2


def test_a_prompt_is_embedded_on_the_gpu_with_two_copies(gpu, make_fake_model):
    model = make_fake_model()
    with gpu.running() as host, torch.inference_mode():
        embeds_BTH, mask_BT = _prompt_embeds(model, PATCHES_BPD, PROMPT_IDS, LEAD)
    assert (embeds_BTH.device, embeds_BTH.dtype) == (DEVICE, torch.bfloat16)
    assert (mask_BT.device, mask_BT.dtype) == (DEVICE, torch.int64)
    assert embeds_BTH.shape == (*mask_BT.shape, 160) == (3, 2 + 4 + 3, 160)
    assert host.waits == ["copy from cpu to cuda"] * 2
