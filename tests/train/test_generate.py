import pytest
import torch
from transformers import GenerationConfig

from train.generate import generate
from train.prompts import question_text

IDS = [100, 139, 117, 100, 121]
PROMPTS = ["", question_text("What is in the box"), "a", question_text("where"), ""]
LIMIT = 12


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(lora=0.5).eval()


@pytest.fixture
def make(model, tokenizer, store):
    def make(image_ids=IDS, prompts=PROMPTS, max_tokens=LIMIT, batch_size=8, model=model):
        return generate(
            model, tokenizer, store, image_ids, prompts,
            max_tokens=max_tokens, batch_size=batch_size, description="test",
        )  # fmt: skip

    return make


@torch.no_grad()
def plain_greedy(model, tokenizer, store, image_id, prompt, max_tokens):
    """No cache, no padding, no library: the whole sequence again for every token."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
    patches = model.embed_patches(torch.from_numpy(store.gather([image_id])))
    made = []
    while len(made) < max_tokens:
        text = torch.tensor([ids + made], dtype=torch.int64)
        embeds = torch.cat([patches, model.embed_text(text)], dim=1)
        logits = model.language_model(inputs_embeds=embeds, use_cache=False).logits[0, -1]
        token_id = int(logits[: len(tokenizer)].argmax())
        if token_id == tokenizer.eos_token_id:
            return made, True
        made.append(token_id)
    return made, False


def assert_plain(found, model, tokenizer, store):
    for generation, image_id, prompt in zip(found, IDS, PROMPTS, strict=True):
        made, stopped = plain_greedy(model, tokenizer, store, image_id, prompt, LIMIT)
        assert generation.text == tokenizer.decode(made).strip()
        assert (generation.num_tokens, generation.stopped) == (len(made), stopped)


def test_it_is_what_a_plain_greedy_loop_makes(make, model, tokenizer, store):
    found = make()
    assert len({g.text for g in found}) > 2, "images and prompts matter"
    assert_plain(found, model, tokenizer, store)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_texts_do_not_depend_on_what_stands_beside_them(make, batch_size):
    assert make(batch_size=batch_size) == make(batch_size=8)
    assert make(IDS[::-1], PROMPTS[::-1]) == make()[::-1]


def test_training_mode_is_left_before(make, model):
    wanted = make()
    model.train()
    assert make() == wanted


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_the_limit_is_a_prefix_and_is_kept(make, limit):
    for short, long in zip(make(max_tokens=limit), make(), strict=True):
        assert short.num_tokens == min(limit, long.num_tokens)
        assert long.text.startswith(short.text) or "\ufffd" in short.text


def test_no_prompts_give_no_texts(make):
    assert make([], []) == []


@pytest.fixture
def biased(make_model, tokenizer):
    """Build a model whose head prefers a token, by so much."""

    def biased(token_id, amount):
        model = make_model()
        model.language_model.lm_head.bias.data[token_id] += amount
        return model

    return biased


def test_an_id_without_a_token_is_never_generated(make, biased, tokenizer, store):
    assert len(tokenizer) < 512
    for unused in (len(tokenizer), 511):
        model = biased(unused, 1e6)
        assert_plain(make(model=model), model, tokenizer, store)


def test_eos_stops_at_once_and_is_not_counted(make, biased, tokenizer):
    for generation in make(model=biased(tokenizer.eos_token_id, 1e6)):
        assert (generation.text, generation.num_tokens, generation.stopped) == ("", 0, True)


def test_without_eos_the_limit_ends_it(make, biased, tokenizer):
    for generation in make(model=biased(tokenizer.eos_token_id, -1e6)):
        assert (generation.num_tokens, generation.stopped) == (LIMIT, False)


def test_texts_of_a_batch_stop_each_on_its_own(make, biased, tokenizer, store):
    swept = set()
    for tenths in range(0, 30, 2):
        model = biased(tokenizer.eos_token_id, tenths / 10)
        found = make(model=model)
        swept |= {(generation.num_tokens, generation.stopped) for generation in found}
        assert_plain(found, model, tokenizer, store)
    assert len(swept) > 3


def test_a_checkpoints_own_taste_in_generation_is_left_out(
    phi_dir, tmp_path, make_model, make, tokenizer, store
):
    """A generation_config.json beside the weights must not change the scores."""
    from train.language_model import load_language_model
    from train.settings import LlmSettings

    for file in phi_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    GenerationConfig(
        do_sample=True, temperature=9.0, repetition_penalty=5.0, no_repeat_ngram_size=1,
        num_beams=3, min_new_tokens=9, bad_words_ids=[[5]],
    ).save_pretrained(tmp_path)  # fmt: skip
    settings = LlmSettings(model=str(tmp_path), quantize="none", dtype="fp32")
    model = make_model()
    wanted = make(model=model)
    model.language_model = load_language_model(settings, torch.device("cpu"))
    assert make(model=model) == wanted


def test_an_eos_written_in_a_question_is_text(make, model, tokenizer, monkeypatch):
    """As in training: were it the token, it would read as the end of an answer."""
    seen = []
    embed = model.embed_text

    def recording(ids):
        seen.extend(ids.tolist())
        return embed(ids)

    monkeypatch.setattr(model, "embed_text", recording)
    make([100], [f"a{tokenizer.eos_token}b"])
    assert tokenizer.decode(seen) == f"a{tokenizer.eos_token}b"
    assert tokenizer.eos_token_id not in seen
