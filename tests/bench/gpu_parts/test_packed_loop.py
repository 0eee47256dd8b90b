import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from bench.gpu_parts import packed_loop
from bench.gpu_parts.packed_loop import HEADS, find_documents, is_installed
from bench.usual_loop import IGNORE_INDEX
from tests.train.images import Image, collate_images
from train.data.prompts import TokenizedText


def text(length):
    return TokenizedText(list(range(1, length + 1)), [True] * length)


def test_every_sequence_and_all_padding_is_a_document():
    images = [Image(number, [text(length)]) for number, length in enumerate((3, 6, 2))]
    # Rows of 6 + 9 and of 5 + padding.
    batch = collate_images([images[:2], images[2:]], 4)
    found = find_documents(batch)
    assert batch.image_numbers.shape == (2, 15)
    assert found.starts.tolist() == [0, 6, 15, 20, 30]
    assert found.starts.dtype == torch.int32
    assert found.longest == 10


def fake_liger():
    module = ModuleType("liger_kernel.transformers.fused_linear_cross_entropy")

    class LigerFusedLinearCrossEntropyLoss:
        def __init__(self, ignore_index, reduction):
            self.options = {"ignore_index": ignore_index, "reduction": reduction}

        def __call__(self, lin_weight, _input, target, bias=None):
            logits = nn.functional.linear(_input, lin_weight, bias)
            return nn.functional.cross_entropy(logits, target, **self.options)

    module.LigerFusedLinearCrossEntropyLoss = LigerFusedLinearCrossEntropyLoss
    return module


def fake_cut_cross_entropy():
    def linear_cross_entropy(e, c, targets, bias=None, ignore_index=-100, reduction="mean"):
        logits = nn.functional.linear(e, c, bias)
        return nn.functional.cross_entropy(
            logits, targets, ignore_index=ignore_index, reduction=reduction
        )

    return SimpleNamespace(linear_cross_entropy=linear_cross_entropy)


@pytest.fixture
def _installed(monkeypatch):
    """Stand-ins with the signatures of both packages' documentation."""
    liger = fake_liger()
    monkeypatch.setitem(sys.modules, liger.__name__, liger)
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", ModuleType("transformers"))
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", fake_cut_cross_entropy())


@pytest.mark.usefixtures("_installed")
def test_all_heads_have_the_same_loss_and_gradient():
    torch.manual_seed(0)
    layer = nn.Linear(8, 30).double().requires_grad_(False)
    labels = torch.randint(0, 30, (50,))
    labels[torch.rand(50) < 0.5] = IGNORE_INDEX
    hidden = torch.randn(50, 8).double()
    found = {}
    for name, head in HEADS.items():
        leaf = hidden.clone().requires_grad_()
        loss = head(layer, leaf, labels)
        torch.autograd.backward(loss)
        found[name] = loss.detach(), leaf.grad
    losses, gradients = zip(*found.values(), strict=True)
    for loss, gradient in zip(losses, gradients, strict=True):
        # transformers' and ours in float32.
        torch.testing.assert_close(loss.double(), losses[0].double(), rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-5, atol=1e-7)


def test_a_head_is_there_when_its_package_is(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert [name for name in HEADS if is_installed(name)] == ["supervised logits", "all logits"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert all(map(is_installed, HEADS))
    assert packed_loop.PACKAGES.keys() < HEADS.keys()
