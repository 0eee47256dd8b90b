"""FlexAttention's Triton kernels, compiled for chips that this machine lacks."""

import json

import pytest

from tests.stand_in_gpu import process

pytestmark = pytest.mark.slow(reason="compiles each kernel for a chip: 15 to 60 s")

PROBE = """
import json, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from train.model.attention import _block_mask, mask_mod, packed_attention, use_packed_attention

heads, key_heads, head_width, dtype = json.loads(sys.argv[1])
with torch.device("meta"):
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=8, hidden_size=heads * head_width, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=heads, num_key_value_heads=key_heads, head_dim=head_width,
    )).to(getattr(torch, dtype))
model = model.to_empty(device="cuda")
print(use_packed_attention(model)[1])
"""

MORE_LENGTHS = """
def attend(length):
    query, key, value = (
        torch.empty(1, number, length, head_width, dtype=model.dtype, device="cuda")
        .requires_grad_() for number in (heads, key_heads, key_heads)
    )
    ids = torch.empty(1, length, dtype=torch.int64, device="cuda")
    out, _ = packed_attention(model, query, key, value, _block_mask(mask_mod(ids, ids), ids))
    torch.autograd.grad(out, (query, key, value), torch.empty_like(out))

attend(384)
with torch.compiler.set_stance("fail_on_recompile"):
    for length in (512, 1408, 8192):
        attend(length)
"""


def run(script, capability, heads, head_width, dtype):
    ran = process.run(
        ["-c", script, json.dumps([*heads, head_width, dtype])], capability=capability
    )
    assert ran.returncode == 0, ran.stderr
    return ran


def probe(*chip_and_model):
    """Whether the probe of FlexAttention compiles, and what it says."""
    ran = run(PROBE, *chip_and_model)
    return ran.stdout.splitlines()[-1] == "True", ran.stderr


@pytest.fixture(autouse=True)
def _needs_stand_in_gpu():
    missing = process.lacking()
    if missing:
        pytest.skip(f"no stand-in GPU: {missing}")


@pytest.mark.parametrize(
    ("capability", "heads", "head_width", "dtype"),
    [
        (75, (9, 3), 64, "float16"),
        (80, (9, 3), 64, "bfloat16"),
        (80, (32, 32), 80, "bfloat16"),
        (80, (32, 32), 80, "float32"),
        (90, (9, 3), 64, "bfloat16"),
        (90, (32, 32), 80, "bfloat16"),
        (90, (9, 3), 128, "bfloat16"),
    ],
)
def test_forward_and_backward_kernels_fit_the_chip(capability, heads, head_width, dtype):
    works, said = probe(capability, heads, head_width, dtype)
    assert works, said


def test_kernels_that_need_more_memory_than_the_chip_has_are_refused_by_the_probe():
    works, said = probe(75, (32, 32), 80, "float16")
    assert not works
    assert "FlexAttention does not work here, SDPA is used" in said
    assert "out of resource" in said


def test_nothing_is_compiled_after_the_second_length():
    ran = run(PROBE + MORE_LENGTHS, 80, (9, 3), 64, "bfloat16")
    assert ran.stdout.splitlines()[-1] == "True", ran.stderr
