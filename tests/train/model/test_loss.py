"""Laws of the chunked cross entropy: PyTorch's numbers, and never many logits at once."""

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from train.model.loss import CHUNK, cross_entropy

WIDTH, VOCABULARY = 6, 640
SIZES = (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 700)


def make_parts(size, dtype):
    torch.manual_seed(size)
    head = nn.Linear(WIDTH, VOCABULARY).to(dtype).requires_grad_(False)
    hidden_SH = (3 * torch.randn(size, WIDTH)).to(dtype).requires_grad_()
    words = torch.randint(8, (size,)) * (VOCABULARY // 8)
    return head, hidden_SH, words


def in_one_piece(head, hidden_SH, target_ids_S):
    logits_SV = head(hidden_SH)
    if logits_SV.dtype == torch.bfloat16:
        logits_SV = logits_SV.float()
    return nn.functional.cross_entropy(logits_SV, target_ids_S, reduction="none")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("dtype", "loss_dtype", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 1e-2),
    ],
)
def test_value_and_gradient_are_those_of_one_piece(size, dtype, loss_dtype, tolerance):
    head, hidden_SH, target_ids_S = make_parts(size, dtype)
    found = cross_entropy(head, hidden_SH, target_ids_S)
    wanted = in_one_piece(head, hidden_SH, target_ids_S)
    assert (found.shape, found.dtype) == ((size,), loss_dtype)
    close = min(tolerance, 1e-5)
    torch.testing.assert_close(found, wanted, rtol=close, atol=close)
    # A step divides the sum by its number of tokens; tokens may also have a weight each.
    for scale in (1.0, -0.3, torch.randn(size, dtype=loss_dtype)):
        (gradient,) = torch.autograd.grad((scale * found).sum(), hidden_SH, retain_graph=True)
        (wanted_gradient,) = torch.autograd.grad(
            (scale * wanted).sum(), hidden_SH, retain_graph=True
        )
        assert gradient.shape == hidden_SH.shape
        assert gradient.dtype == dtype
        assert (gradient - wanted_gradient).norm() <= tolerance * wanted_gradient.norm()


def test_it_is_a_link_of_the_chain_rule():
    head, hidden_SH, target_ids_S = make_parts(CHUNK + 1, torch.float64)
    found = cross_entropy(head, hidden_SH.sin(), target_ids_S).square().sum()
    wanted = in_one_piece(head, hidden_SH.sin(), target_ids_S).square().sum()
    (gradient,) = torch.autograd.grad(found, hidden_SH)
    (wanted_gradient,) = torch.autograd.grad(wanted, hidden_SH)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_value_is_the_same(size, mode):
    head, hidden_SH, target_ids_S = make_parts(size, torch.float32)
    wanted = cross_entropy(head, hidden_SH, target_ids_S).detach()
    with mode():
        found = cross_entropy(head, hidden_SH.detach().clone(), target_ids_S)
        assert not found.requires_grad
        assert torch.equal(found, wanted)


def test_the_head_gets_no_gradient_and_the_mode_is_left_as_it_was():
    head, hidden_SH, target_ids_S = make_parts(3, torch.float32)
    with torch.no_grad():
        cross_entropy(head, hidden_SH, target_ids_S)
        assert not torch.is_grad_enabled()
    cross_entropy(head, hidden_SH, target_ids_S).sum().backward()
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in head.parameters())


class Alive(TorchDispatchMode):
    """Measures the elements that all tensors made meanwhile hold at a time, and the largest."""

    def __init__(self):
        super().__init__()
        self._held = {}
        self.most = self.largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if torch.is_tensor(tensor) and tensor.is_floating_point():
                storage = StorageWeakRef(tensor.untyped_storage())
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                self._held[storage.cdata] = (storage, size)
                self.largest = max(self.largest, tensor.numel())
        self._held = {key: one for key, one in self._held.items() if not one[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._held.values()))
        return made


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_logits_live_for_one_chunk_at_a_time(mode):
    size = 10 * CHUNK + 1
    head, hidden_SH, target_ids_S = make_parts(size, torch.float32)
    shapes = []

    def recording(hidden_CH):
        shapes.append(tuple(hidden_CH.shape))
        return head(hidden_CH)

    with mode():
        hidden_SH = hidden_SH.detach().requires_grad_(mode is torch.enable_grad)
        with Alive() as alive:
            loss = cross_entropy(recording, hidden_SH, target_ids_S)
        assert shapes == [(CHUNK, WIDTH)] * 10 + [(1, WIDTH)]
        assert alive.largest == CHUNK * VOCABULARY
        # Of a chunk logits, logarithms, gradient and what one operation adds; of all, gradients.
        assert alive.most <= 4 * CHUNK * VOCABULARY + 3 * size * WIDTH
        if loss.requires_grad:
            with Alive() as alive:
                loss.sum().backward()
            assert alive.most <= 3 * size * WIDTH
