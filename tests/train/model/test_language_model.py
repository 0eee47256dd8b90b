import re

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PhiConfig, PhiForCausalLM

import train.model.language_model
from cache.errors import SettingsError
from tests.train.images import Image, collate_images, logits_of
from train.data.prompts import caption_turns, tokenize
from train.model.captioner import CaptionModel
from train.model.language_model import (
    add_lora,
    compute_lora_in_input_dtype,
    load_language_model,
    load_lora,
    load_tokenizer,
)
from train.settings import LlmSettings, LoraSettings
from workspace.errors import StageError

LAYERS = 2
LORA = LoraSettings(r=4, alpha=8, dropout=0.05)


def settings_for(folder, quantize="nf4", dtype="fp32"):
    return LlmSettings(model=str(folder), quantize=quantize, dtype=dtype)


LINEAR_NAMES = {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}


@pytest.fixture
def load(phi_dir):
    def load(quantize="nf4", dtype="fp32", folder=phi_dir):
        return load_language_model(settings_for(folder, quantize, dtype), torch.device("cpu"))

    return load


@pytest.fixture
def batch(prompt_format, patches):
    texts = [caption_turns("a red cat"), caption_turns("the dog is in the box")]
    texts = tuple(tokenize(texts, prompt_format, 99))
    return collate_images([[Image(n, texts)] for n in range(2)], patches)


@pytest.fixture
def patches(store):
    return torch.from_numpy(store.gather([100, 139]))


def base_weights(model):
    """Everything that must never change, quantised bytes and their statistics included."""
    return {n: t.clone() for n, t in model.state_dict().items() if "lora_" not in n}


def linear_names(model, kind):
    return [n for n, m in model.named_modules() if isinstance(m, kind)]


def test_nf4_quantises_the_blocks_and_nothing_else(load):
    model = load("nf4")
    names = linear_names(model, Linear4bit)
    assert len(names) == 6 * LAYERS
    assert {name.rpartition(".")[2] for name in names} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "dense",
        "fc1",
        "fc2",
    }
    for name in names:
        weight = model.get_submodule(name).weight
        assert weight.dtype == torch.uint8
        assert weight.numel() == weight.quant_state.shape.numel() // 2, "two numbers a byte"
        assert weight.quant_state.quant_type == "nf4"
        assert weight.quant_state.nested, "double quantisation"
    assert type(model.lm_head) is nn.Linear
    assert type(model.get_input_embeddings()) is nn.Embedding


def test_none_leaves_the_weights_as_they_are(load, phi_dir):
    wanted = PhiForCausalLM.from_pretrained(phi_dir).state_dict()
    found = load("none").state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("dtype", "is_native", "warns"),
    [("bf16", False, True), ("bf16", True, False), ("fp16", False, False)],
)
def test_a_gpu_that_emulates_bf16_is_named_with_what_to_set(
    phi_dir, monkeypatch, capsys, dtype, is_native, warns
):
    class Warned(Exception):
        pass

    def stop(model):
        raise Warned

    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **o: asked.append(o) or is_native)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(train.model.language_model, "build_empty", stop)
    with pytest.raises(Warned):
        load_language_model(settings_for(phi_dir, dtype=dtype), torch.device("cuda"))
    assert asked in ([], [{"including_emulation": False}])
    said = capsys.readouterr().err
    assert ("Tesla T4 has no bf16" in said and "llm.dtype: fp16" in said) == warns
    assert warns or said == ""


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_nf4_computes_in_the_type_that_is_asked_for(load, dtype, wanted):
    model = load("nf4", dtype)
    kinds = [m.compute_dtype for m in model.modules() if isinstance(m, Linear4bit)]
    assert kinds == [wanted] * 6 * LAYERS
    assert model.dtype == model.lm_head.weight.dtype == wanted


@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_a_loaded_model_is_frozen_and_not_random(load, quantize):
    model = load(quantize)
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m.training for m in model.modules())


def test_the_number_of_threads_changes_no_bit_of_a_quantised_model(load, tmp_path):
    # Wide enough that torch shares out the mean of a layer's 65,536 block maxima.
    wide = {"hidden_size": 512, "intermediate_size": 8192, "num_attention_heads": 8}
    torch.manual_seed(0)
    phi = PhiForCausalLM(PhiConfig(vocab_size=64, num_hidden_layers=3, **wide))
    phi.half().save_pretrained(tmp_path)

    def offsets(threads):
        torch.set_num_threads(threads)
        layers = load("nf4", folder=tmp_path).model.layers
        assert torch.get_num_threads() == threads
        wide = [layer for block in layers for layer in (block.mlp.fc1, block.mlp.fc2)]
        return [layer.weight.quant_state.offset.item() for layer in wide]

    assert offsets(1) == offsets(2) == offsets(3) == offsets(5)


@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_the_bias_of_the_head_is_kept(load, quantize, phi_dir):
    found = load(quantize).lm_head.bias
    wanted = load_file(phi_dir / "model.safetensors")["lm_head.bias"]
    assert torch.equal(found, wanted)
    assert wanted.abs().min() > 0


@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_lora_stands_beside_every_layer_of_the_blocks_and_alone_learns(load, quantize):
    model = load(quantize)
    adapter = add_lora(model, LORA, seed=0)
    touched = [n for n, m in model.named_modules() if "lora_A" in m._modules]
    assert len(touched) == 6 * LAYERS
    assert {name.rpartition(".")[2] for name in touched} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "dense",
        "fc1",
        "fc2",
    }
    learning = [n for n, p in adapter.named_parameters() if p.requires_grad]
    assert len(learning) == 2 * 6 * LAYERS
    assert all("lora_A" in name or "lora_B" in name for name in learning)
    assert learning == [n for n, _ in adapter.named_parameters() if "lora_" in n]


def test_fresh_lora_changes_no_logit_and_depends_on_the_seed_alone(make_model, batch):
    plain = make_model().eval()
    before = logits_of(plain, batch)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    add_lora(plain.language_model, LORA, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits_of(plain.eval(), batch), before)
    torch.manual_seed(2)
    models = [make_model().language_model for _ in range(2)]
    for model, seed in zip(models, (5, 6), strict=True):
        add_lora(model, LORA, seed)
    first, again, other = (
        {n: p for n, p in model.named_parameters() if "lora_A" in n}
        for model in (plain.language_model, *models)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_a_step_changes_lora_and_projector_and_no_bit_of_the_base(
    make_model, batch, quantize, dtype
):
    model = make_model(quantize=quantize, dtype=dtype, lora=0.05)
    learning = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in learning} == {torch.float32}
    before, old = base_weights(model.language_model), [p.detach().clone() for p in learning]
    optimizer = torch.optim.AdamW(learning, lr=0.1)
    model.train()
    model(batch).backward()
    optimizer.step()
    after = base_weights(model.language_model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(torch.equal(p, o) for p, o in zip(learning, old, strict=True))


@pytest.mark.parametrize("quantize", ["nf4", "none"])
@pytest.mark.parametrize(
    ("dtype", "most_difference"), [("fp32", 0.0), ("bf16", 0.03), ("fp16", 0.01)]
)
def test_lora_in_the_dtype_of_its_input_learns_the_same_in_less_memory(
    make_model, batch, quantize, dtype, most_difference
):
    model = make_model(quantize=quantize, dtype=dtype, lora=0.0).train()
    matrices = {n: p for n, p in model.named_parameters() if "lora_" in n}

    def gradient_and_saved_bytes():
        saved = {}

        def count(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(batch)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in matrices.values()])
        return gradient, sum(saved.values())

    wanted, bytes_of_peft = gradient_and_saved_bytes()
    compute_lora_in_input_dtype(model)
    found, num_bytes = gradient_and_saved_bytes()
    assert found.dtype == torch.float32
    assert {p.dtype for p in matrices.values()} == {torch.float32}
    assert (found - wanted).norm() <= most_difference * wanted.norm()
    assert wanted.norm() > 0
    if dtype != "fp32":
        # In float16, attention keeps float32 copies of its own.
        assert num_bytes < (0.8 if dtype == "bf16" else 0.85) * bytes_of_peft


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_gradients_flow_through_nf4_after_a_pass_without_them(make_model, batch, dtype):
    """Where the CPU has AVX512-BF16, bitsandbytes would repack the weights for good."""
    model = make_model(quantize="nf4", dtype=dtype, lora=0.0).train()

    def gradients():
        model.zero_grad()
        model(batch).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    before = gradients()
    weights = base_weights(model.language_model)
    with torch.inference_mode():
        model.eval()(batch)
    with torch.no_grad():
        model.eval()(batch)
    model.train()
    assert all(torch.equal(w, weights[n]) for n, w in base_weights(model.language_model).items())
    after = gradients()
    assert before["projector.layers.0.weight"].abs().sum() > 0
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_training_turns_on_the_dropout_of_lora_and_no_other(make_model, batch):
    model = make_model(lora=0.5)
    dropouts = {n: m for n, m in model.named_modules() if isinstance(m, nn.Dropout)}
    phis = [n for n in dropouts if "lora_dropout" not in n]
    assert phis
    assert len(dropouts) - len(phis) == 6 * LAYERS
    assert any(dropouts[name].p > 0 for name in phis), "Phi-2's config has dropout"
    for mode in (True, False, True):
        assert model.train(mode) is model
        for name, module in dropouts.items():
            assert module.training == (mode and name not in phis), name
        assert model.projector.training == mode
    model.eval()
    assert torch.equal(logits_of(model, batch), logits_of(model, batch))
    model.train()
    assert not torch.equal(logits_of(model, batch), logits_of(model, batch))


def test_a_frozen_model_computes_the_same_in_training_and_in_eval(make_model, batch):
    model = make_model()
    assert torch.equal(model.train()(batch), model.eval()(batch))


@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_saved_lora_gives_the_logits_that_it_had(make_model, load, quantize, batch, tmp_path):
    model = make_model(quantize=quantize)
    adapter = add_lora(model.language_model, LORA, seed=0)
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    adapter.save_pretrained(tmp_path, safe_serialization=True)
    wanted = logits_of(model.eval(), batch)
    model = CaptionModel(model.projector, load(quantize))
    assert not torch.equal(logits_of(model.eval(), batch), wanted)
    load_lora(model.language_model, tmp_path)
    assert torch.equal(logits_of(model.eval(), batch), wanted)
    assert not any(p.requires_grad for p in model.language_model.parameters())


@pytest.fixture
def adapter_dir(load, tmp_path):
    add_lora(load("none"), LORA, seed=0).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_folder_without_safetensors_is_no_adapter(load, adapter_dir, tmp_path):
    with pytest.raises(StageError, match=r"nothing: holds no adapter_model.safetensors"):
        load_lora(load("none"), tmp_path / "nothing")
    weights = adapter_dir / "adapter_model.safetensors"
    torch.save(load_file(weights), adapter_dir / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(StageError, match=r"holds no adapter_model.safetensors"):
        load_lora(load("none"), adapter_dir)


def damage(adapter_dir, how):
    weights, config = adapter_dir / "adapter_model.safetensors", adapter_dir / "adapter_config.json"
    tensors = load_file(weights)
    if how == "half":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "other shapes":
        save_file({n: t[:, :-1].contiguous() for n, t in tensors.items()}, weights)
    elif how == "fewer layers":
        save_file({n: t for n, t in tensors.items() if "layers.1." not in n}, weights)
    elif how == "other names":
        save_file({n.replace("layers", "blocks"): t for n, t in tensors.items()}, weights)
    elif how == "more layers":
        extra = {n.replace("layers.1.", "layers.2."): t.clone() for n, t in tensors.items()}
        save_file(tensors | extra, weights)
    elif how == "no config":
        config.unlink()
    elif how == "config of no JSON":
        config.write_text("{")


@pytest.mark.parametrize(
    "how",
    ["half", "empty", "other shapes", "fewer layers", "other names", "more layers", "no config",
     "config of no JSON"],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_the_model_is_refused(load, adapter_dir, how):
    damage(adapter_dir, how)
    with pytest.raises(StageError, match=re.escape(str(adapter_dir))) as error:
        load_lora(load("none"), adapter_dir)
    assert "\n" not in str(error.value)


def test_a_missing_model_is_named(tmp_path):
    folder = tmp_path / "no" / "model"
    for load in (load_tokenizer, lambda s: load_language_model(s, torch.device("cpu"))):
        with pytest.raises(SettingsError, match=r"llm\.model: cannot load") as error:
            load(settings_for(folder))
        assert str(folder) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", ["half", "pickle", "other shapes", "no bias", "no config"])
def test_a_damaged_model_is_refused(load, phi_dir, tmp_path, how):
    for file in phi_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    if how == "half":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif how == "pickle":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        weights.unlink()
    elif how == "other shapes":
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].contiguous()
        save_file(tensors, weights, {"format": "pt"})
    elif how == "no bias":
        del tensors["lm_head.bias"]
        save_file(tensors, weights, {"format": "pt"})
    else:
        (tmp_path / "config.json").unlink()
    with pytest.raises(SettingsError, match=r"llm\.model: cannot load"):
        load("none", folder=tmp_path)


def test_a_tokenizer_without_eos_is_refused(tokenizer, tmp_path):
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    plain.save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match="no EOS token"):
        load_tokenizer(settings_for(tmp_path))


def test_a_tokenizer_in_python_is_refused(tmp_path):
    from transformers import CTRLTokenizer

    (tmp_path / "vocab.json").write_text('{"a</w>": 0, "<unk>": 1, "<eos>": 2}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na </w>\n")
    slow = CTRLTokenizer(tmp_path / "vocab.json", tmp_path / "merges.txt", eos_token="<eos>")
    slow.save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match="found CTRLTokenizer"):
        load_tokenizer(settings_for(tmp_path))
