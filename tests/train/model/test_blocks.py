"""Laws of how blocks run: the numbers stay; memory or time does not."""

import pytest
import torch
import torch._dynamo.utils
from torch._dynamo.backends.debugging import aot_eager
from transformers import PhiConfig, PhiForCausalLM

from cache.errors import SettingsError
from tests.train.images import collate_images, pack_images
from train.model.blocks import compile_blocks, recompute_blocks
from train.model.captioner import CaptionModel
from train.model.generate import generate
from train.model.language_model import add_lora
from train.model.projector import seeded_projector
from train.settings import LoraSettings

PATCHES, WIDTH, HIDDEN = 4, 8, 64


@pytest.fixture
def batch(random_images):
    (rows,) = pack_images(random_images(0), PATCHES, row_tokens=60, pass_tokens=10_000)
    features = torch.randn(9, PATCHES, WIDTH, generator=torch.Generator().manual_seed(0)).half()
    return collate_images(rows, features)


def loss_and_gradients(model, batch):
    """Return what a pass gives, with the dropout that a seed decides."""
    model.train().zero_grad()
    torch.manual_seed(3)
    loss = model(batch)
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.trainable_parameters().items()}


def assert_same_bits(found, wanted):
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def deep_model(layers):
    """A Phi of any depth, with LoRA that drops."""
    torch.manual_seed(0)
    phi = PhiForCausalLM(
        PhiConfig(
            vocab_size=128, hidden_size=HIDDEN, intermediate_size=128, num_hidden_layers=layers,
            num_attention_heads=2, max_position_embeddings=256, pad_token_id=None,
        )
    ).requires_grad_(False)  # fmt: skip
    add_lora(phi, LoraSettings(r=4, alpha=8, dropout=0.2), 0)
    return CaptionModel(seeded_projector("mlp", WIDTH, HIDDEN, 0), phi)


def saved_bytes(model, batch):
    """Return the bytes that a forward pass keeps for its backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(batch)
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("lora", [None, 0.5])
def test_recomputing_changes_no_bit(make_model, batch, lora, quantize, dtype):
    wanted = loss_and_gradients(make_model(lora=lora, quantize=quantize, dtype=dtype), batch)
    model = make_model(lora=lora, quantize=quantize, dtype=dtype)
    recompute_blocks(model.language_model)
    found = loss_and_gradients(model, batch)
    assert_same_bits(found, wanted)
    if lora is not None:
        torch.manual_seed(4)
        assert not torch.equal(model(batch), wanted["loss"])


def batch_of(random_images, seed, count):
    """A row of as many images."""
    (rows,) = pack_images(
        random_images(seed, count=count), PATCHES, row_tokens=10_000, pass_tokens=10_000
    )
    features = torch.randn(count, PATCHES, WIDTH, generator=torch.Generator().manual_seed(seed))
    return collate_images(rows, features.half())


@pytest.fixture
def compilations():
    """A backend that needs no compiler, and the graphs that it was given."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    yield backend, graphs
    torch._dynamo.reset()


def assert_close(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert (found[name] - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("lora", [None, 0.0])
def test_blocks_compile_whole_and_twice_for_all_lengths(
    make_model, random_images, compilations, lora, quantize, recomputed
):
    backend = compilations[0]
    plain = make_model(lora=lora, quantize=quantize)
    model = make_model(lora=lora, quantize=quantize)
    compile_blocks(model.language_model, model.projector, backend=backend)
    if recomputed:
        recompute_blocks(model.language_model)
    counts = torch._dynamo.utils.counters["stats"]
    counts.clear()
    lengths = set()
    for seed, count in enumerate((5, 9, 3, 7)):
        batch = batch_of(random_images, seed, count)
        lengths.add(batch.token_ids.shape[1])
        assert_close(loss_and_gradients(model, batch), loss_and_gradients(plain, batch))
    assert len(lengths) == 4
    # One for the first block, one for the others, one for the projector.
    assert counts["unique_graphs"] == 3


def test_compiled_dropout_is_the_same_again_when_recomputed(
    make_model, random_images, compilations
):
    batch = batch_of(random_images, 0, 5)
    found = []
    for recomputed in (False, True):
        model = make_model(lora=0.5)
        compile_blocks(model.language_model, model.projector, backend=compilations[0])
        if recomputed:
            recompute_blocks(model.language_model)
        found.append(loss_and_gradients(model, batch))
    assert_close(*found)


def test_nothing_is_compiled_where_there_is_no_backward_pass(
    make_model, batch, prompt_format, store, compilations
):
    model, graphs = make_model(lora=0.5), compilations[1]
    compile_blocks(model.language_model, model.projector, backend=compilations[0])
    graphs.clear()
    model.eval()
    with torch.inference_mode():
        model(batch)
    generate(
        model,
        prompt_format,
        store,
        [100],
        ["What is"],
        max_tokens=4,
        batch_size=1,
        description="test",
    )
    assert graphs == []


def test_where_nothing_compiles_the_setting_is_refused_by_name(make_model, compilations):
    def no_compiler(graph, inputs):
        raise RuntimeError("no g++\nfound")

    model = make_model()
    with pytest.raises(SettingsError, match=r"compile: true, but torch.compile does not") as error:
        compile_blocks(model.language_model, model.projector, backend=no_compiler)
    assert "no g++ found" in str(error.value)
    assert "\n" not in str(error.value)
    assert "set compile: false" in str(error.value)


def test_a_recomputed_block_keeps_its_input_and_nothing_else(batch):
    def bytes_of_a_block(recomputed):
        models = {layers: deep_model(layers) for layers in (2, 6)}
        if recomputed:
            for model in models.values():
                recompute_blocks(model.language_model)
        return (saved_bytes(models[6], batch) - saved_bytes(models[2], batch)) / 4

    hidden_bytes = batch.token_ids.numel() * HIDDEN * 4
    assert bytes_of_a_block(recomputed=True) == hidden_bytes
    assert bytes_of_a_block(recomputed=False) > 10 * hidden_bytes


def test_blocks_run_once_where_there_is_no_backward_pass(make_model, batch, prompt_format, store):
    def outputs(model):
        model.eval()
        with torch.inference_mode():
            loss = model(batch)
        texts = generate(
            model, prompt_format, store, [100, 139], [None, "What is"],
            max_tokens=9, batch_size=2, description="test",
        )  # fmt: skip
        return loss, texts

    wanted_loss, wanted = outputs(make_model(lora=0.5))
    model = make_model(lora=0.5)
    recompute_blocks(model.language_model)
    calls = []
    model.language_model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    loss, texts = outputs(model)
    assert torch.equal(loss, wanted_loss)
    assert texts == wanted
    steps = len(calls)
    loss_and_gradients(model, batch)
    assert len(calls) == steps + 2
