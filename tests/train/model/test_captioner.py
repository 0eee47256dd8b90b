"""Laws of the model as a whole: what learns, what runs while training, which types meet."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.activations import NewGELUActivation

from tests.train.images import Image, collate_images
from train.data.prompts import caption_turns, tokenize
from train.model.language_model import DTYPES, lora_dropouts

PATCHES, WIDTH = 4, 8


@pytest.fixture
def batch(prompt_format, patches):
    texts = tokenize([caption_turns("a red cat"), caption_turns("the dog")], prompt_format, 99)
    return collate_images([[Image(n, (text,)) for n, text in enumerate(texts)]], patches)


@pytest.fixture
def patches():
    return torch.randn(2, PATCHES, WIDTH, generator=torch.Generator().manual_seed(0)).half()


@pytest.mark.parametrize("lora", [None, 0.5])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_projector_and_lora_learn_and_nothing_else(make_model, lora, quantize):
    model = make_model(lora=lora, quantize=quantize)
    names = set(model.trainable_parameters())
    assert {name for name in names if name.startswith("projector.")} == {
        f"projector.{name}" for name, _ in model.projector.named_parameters()
    }
    others = {name for name in names if not name.startswith("projector.")}
    assert all("lora_" in name for name in others)
    # Two matrices on six layers of two blocks.
    assert len(others) == (0 if lora is None else 24)


def test_only_loras_dropout_runs_while_training(make_model):
    model = make_model(lora=0.5)
    for mode in (True, False, True):
        model.train(mode)
        running = {name for name, module in model.language_model.named_modules() if module.training}
        wanted = "lora_dropout.default"
        assert all(name.endswith(("lora_dropout", wanted)) for name in running)
        assert len([name for name in running if name.endswith(wanted)]) == (12 if mode else 0)
        assert model.projector.training == mode
    assert len(lora_dropouts(model.language_model)) == 12


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_patches_of_half_precision_become_embeddings_of_the_language_models_type(
    make_model, batch, patches, dtype
):
    model = make_model(dtype=dtype).eval()
    wanted = DTYPES[dtype]
    assert {p.dtype for p in model.projector.parameters()} == {torch.float32}
    assert model.embed_patches(patches).dtype == model.embed_text(batch.token_ids).dtype == wanted
    exact = model.projector(patches.float()).to(wanted)
    assert torch.equal(model.embed_patches(patches), exact)
    loss = model(batch)
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.trainable_parameters().values())


def test_the_head_is_asked_at_supervised_positions_only(make_model, batch, patches):
    model = make_model()
    seen = []
    model.language_model.lm_head.register_forward_hook(
        lambda module, inputs, output: seen.append(tuple(output.shape))
    )
    model(batch)
    assert seen == [(1, len(batch.target_ids), model.language_model.config.vocab_size)]
    assert len(batch.target_ids) < batch.token_ids.numel()


def test_the_gelu_of_one_operation_is_that_of_eight(make_model):
    model = make_model("mlp")
    layers = model.language_model.model.layers
    assert [type(layer.mlp.activation_fn) for layer in layers] == [torch.nn.GELU] * 2
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64, requires_grad=True)
    fused, plain = layers[0].mlp.activation_fn(x), NewGELUActivation()(x)
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-15)
    (found,) = torch.autograd.grad(fused.sum(), x)
    (wanted,) = torch.autograd.grad(plain.sum(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


def test_no_gradient_is_added_in_an_order_that_threads_decide(make_model, batch, patches):
    """On a CPU, `index_put` with `accumulate` adds atomically from several threads."""

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            names.append(function.name())
            return function(*arguments, **(options or {}))

    names: list[str] = []
    with Recorded():
        make_model(lora=0.0)(batch).backward()
    assert "aten::index_add" in names
    assert not {name for name in names if "index_put" in name or "scatter_add" in name}
