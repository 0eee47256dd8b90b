import dataclasses
import itertools
import json
import math
import threading

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig

from cache.errors import SettingsError
from tests.train.data.chat_tokenizers import chat_tokenizer, fast
from tests.train.model.families import FAMILIES
from train.data.chat_format import chat_format
from train.model.captioner import CaptionModel
from train.model.generate import Generation, Sampling, generate, stream
from train.model.projector import seeded_projector

IDS = [100, 139, 117, 100, 121]
QUESTIONS = [None, "What is in the box", "a", "where", None]
LIMIT = 12


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(lora=0.5).eval()


@pytest.fixture
def make(model, prompt_format, store):
    def make(image_ids=IDS, questions=QUESTIONS, max_tokens=LIMIT, batch_size=8, model=model):
        return generate(
            model, prompt_format, store, image_ids, questions,
            max_tokens=max_tokens, batch_size=batch_size, description="test",
        )  # fmt: skip

    return make


@torch.no_grad()
def plain_greedy(model, tokenizer, store, image_id, question, max_tokens):
    """No cache, no padding, no library: the whole sequence again for every token."""
    prompt = "" if question is None else f"Instruct: {question}\nOutput:"
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
    for generation, image_id, question in zip(found, IDS, QUESTIONS, strict=True):
        made, stopped = plain_greedy(model, tokenizer, store, image_id, question, LIMIT)
        assert generation.text == tokenizer.decode(made).strip()
        assert (generation.num_tokens, generation.stopped) == (len(made), stopped)


def test_it_is_what_a_plain_greedy_loop_makes(make, model, tokenizer, store):
    found = make()
    assert len({g.text for g in found}) > 2, "images and prompts matter"
    assert_plain(found, model, tokenizer, store)


def test_behind_pooled_patches_too(make, make_model, tokenizer, store):
    pooling = make_model(lora=0.5).eval()
    whole = make(model=pooling)
    pooling.projector.pool = 2
    found = make(model=pooling)
    assert found != whole
    assert_plain(found, pooling, tokenizer, store)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_texts_do_not_depend_on_what_stands_beside_them(make, batch_size):
    assert make(batch_size=batch_size) == make(batch_size=8)
    assert make(IDS[::-1], QUESTIONS[::-1]) == make()[::-1]


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
    for tenths in range(30):
        model = biased(tokenizer.eos_token_id, tenths / 10)
        found = make(model=model)
        swept |= {(generation.num_tokens, generation.stopped) for generation in found}
        assert_plain(found, model, tokenizer, store)
    assert len(swept) > 3


def test_a_checkpoints_own_taste_in_generation_is_left_out(
    phi_dir, tmp_path, make_model, make, tokenizer, store
):
    """A generation_config.json beside the weights must not change the scores."""
    from train.model.language_model import load_language_model
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
    assert tokenizer.decode(seen) == f"Instruct: a{tokenizer.eos_token}b\nOutput:"
    assert tokenizer.eos_token_id not in seen


# A chat template


@torch.no_grad()
def chat_greedy(model, prompt_format, store, image_id, question, max_tokens=LIMIT):
    """The tokens of a plain loop over lead, patches and prompt."""
    before = model.embed_text(torch.tensor([prompt_format.lead]))
    patches = model.embed_patches(torch.from_numpy(store.gather([image_id])))
    (prompt,) = prompt_format.prompts([question])
    known = sorted(prompt_format.tokenizer.get_vocab().values())
    made = []
    while len(made) < max_tokens:
        text = model.embed_text(torch.tensor([prompt + made]))
        embeds = torch.cat([before, patches, text], dim=1)
        logits = model.language_model(inputs_embeds=embeds, use_cache=False).logits[0, -1]
        token_id = known[int(logits[known].argmax())]
        if token_id in prompt_format.end_ids:
            return made, True
        made.append(token_id)
    return made, False


def ask(model, prompt_format, store, questions=QUESTIONS):
    return generate(
        model, prompt_format, store, IDS, questions,
        max_tokens=LIMIT, batch_size=3, description="test",
    )  # fmt: skip


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
@pytest.mark.parametrize("amount", [-1e6, 1.0, 2.0, 1e6])
def test_the_lead_is_read_and_every_end_token_stops(biased, chat_prompts, store, end, amount):
    model = biased(chat_prompts.tokenizer.convert_tokens_to_ids(end), amount).eval()
    for generation, image_id, question in zip(
        ask(model, chat_prompts, store), IDS, QUESTIONS, strict=True
    ):
        made, stopped = chat_greedy(model, chat_prompts, store, image_id, question)
        assert generation == Generation(chat_prompts.decode(made), len(made), stopped)
        pieces = stream(
            model, chat_prompts, store.gather([image_id])[0], chat_prompts.prompts([question])[0],
            max_tokens=LIMIT,
        )  # fmt: skip
        assert "".join(pieces) == generation.text
        if amount == 1e6:
            assert (generation.text, generation.stopped) == ("", True)


def test_without_its_lead_a_model_writes_something_else(biased, chat_prompts, store):
    model = biased(chat_prompts.end_ids[0], -1e6).eval()
    bare = dataclasses.replace(chat_prompts, lead=())
    assert ask(model, bare, store) != ask(model, chat_prompts, store)


def test_the_end_of_a_turn_is_not_shown_even_if_the_tokenizer_does_not_call_it_special(
    biased, store
):
    tokenizer = chat_tokenizer("ChatML whose tokens are not special")
    prompts = chat_format(tokenizer, {tokenizer.eos_token_id}, AssertionError)
    for amount in (1.0, 2.0, 3.0, 1e6):
        model = biased(tokenizer.convert_tokens_to_ids("<|im_end|>"), amount).eval()
        for image_id, question, wanted in zip(
            IDS, QUESTIONS, ask(model, prompts, store), strict=True
        ):
            pieces = stream(
                model, prompts, store.gather([image_id])[0], prompts.prompts([question])[0],
                max_tokens=LIMIT,
            )  # fmt: skip
            text = "".join(pieces)
            assert text == wanted.text
            assert "<|im_end|>" not in text


def test_an_id_in_a_gap_of_the_vocabulary_is_never_generated(biased, chat_prompts, store):
    """Tokenizers may leave out ids between their entries."""
    state = json.loads(chat_prompts.tokenizer.backend_tokenizer.to_str())
    merged = {token for merge in state["model"]["merges"] for token in merge}
    unused = next(token for token in state["model"]["vocab"] if token not in merged)
    gap = state["model"]["vocab"].pop(unused)
    backend = Tokenizer.from_str(json.dumps(state))
    tokenizer = fast(backend, chat_prompts.tokenizer.chat_template, eos_token="<|endoftext|>")
    assert gap < len(tokenizer)
    assert gap not in tokenizer.get_vocab().values()
    prompts = chat_format(tokenizer, {tokenizer.eos_token_id}, AssertionError)
    for token_id in (gap, len(tokenizer) + 1, 511):
        model = biased(token_id, 1e6).eval()
        for generation, image_id, question in zip(
            ask(model, prompts, store), IDS, QUESTIONS, strict=True
        ):
            made, _ = chat_greedy(model, prompts, store, image_id, question)
            assert token_id not in made
            assert generation.text == prompts.decode(made)


# Sampling


@pytest.fixture
def drawn(model, prompt_format, store):
    """Make one text an image by drawing tokens."""

    def drawn(image_ids=IDS, model=model, max_tokens=LIMIT, **sampling):
        values = {"temperature": 1.0, "top_p": 1.0, "seed": 0} | sampling
        return generate(
            model, prompt_format, store, image_ids, [None] * len(image_ids), max_tokens=max_tokens,
            batch_size=999, description="test", sampling=Sampling(**values),
        )  # fmt: skip

    return drawn


def test_the_same_seed_gives_the_same_text_and_another_seed_another(drawn):
    assert drawn(seed=1) == drawn(seed=1)
    assert len({str(drawn(seed=seed)) for seed in range(5)}) == 5


def test_drawing_leaves_the_random_state_as_it_was(drawn):
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    drawn(seed=5)
    assert torch.equal(torch.rand(2), wanted)


def test_near_temperature_zero_it_is_greedy(drawn, make):
    greedy = make(IDS, [None] * len(IDS))
    assert drawn(temperature=0.001) == greedy
    assert drawn(top_p=1e-9) == greedy
    assert drawn(temperature=9.0) != greedy


def test_an_id_without_a_token_is_never_drawn(drawn, make_model, tokenizer):
    model = make_model()
    model.language_model.lm_head.bias.data[len(tokenizer) :] += 1e6
    for generation in drawn(model=model, temperature=2.0):
        assert generation.text or generation.num_tokens < 2, "such ids decode to nothing"


@pytest.fixture
def even(make_model):
    """Build a model for which every token is nearly as likely, but for some."""

    def even(token_ids=(), amount=0.0):
        model = make_model()
        head = model.language_model.lm_head
        torch.nn.init.zeros_(head.weight)
        head.bias.data = torch.linspace(0, 1e-3, len(head.bias))
        head.bias.data[list(token_ids)] = amount
        return model

    return even


def test_every_token_can_be_drawn_not_only_the_fifty_likeliest(even, drawn):
    firsts = drawn([100] * 400, model=even(), max_tokens=1)
    assert len({generation.text for generation in firsts}) > 60


def test_top_p_keeps_to_the_likeliest(even, tokenizer, drawn):
    likely = tokenizer("abc", add_special_tokens=False)["input_ids"]
    # Half of the probability for these together.
    model = even(likely, math.log((len(tokenizer) - len(likely)) / len(likely)))
    firsts = drawn([100] * 100, model=model, max_tokens=1, top_p=0.45)
    assert {generation.text for generation in firsts} <= {tokenizer.decode([i]) for i in likely}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [0, -1, 1e-30, math.nan, math.inf]),
        ("top_p", [0, -0.1, 1.1, math.nan]),
        ("seed", [-1, 2**63]),
    ],
)
def test_sampling_that_cannot_be_is_refused(name, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"^{name} is .*, wanted"):
            Sampling(**({"temperature": 1.0, "top_p": 0.5, "seed": 0} | {name: value}))


# Streaming


@pytest.fixture
def streamed(model, prompt_format, store):
    """Stream a text about an image."""

    def streamed(
        image_id, question, max_tokens=LIMIT, model=model, prompt_format=prompt_format, **sampling
    ):
        return stream(
            model, prompt_format, store.gather([image_id])[0], prompt_format.prompts([question])[0],
            max_tokens=max_tokens, sampling=Sampling(**sampling) if sampling else None,
        )  # fmt: skip

    return streamed


@pytest.fixture
def chatty(biased, tokenizer):
    """A model that never stops by itself."""
    return biased(tokenizer.eos_token_id, -1e6)


def streaming_threads():
    return [t for t in threading.enumerate() if t.name.startswith("stream")]


@pytest.mark.parametrize("limit", [1, 2, 12, 60])
def test_the_pieces_join_to_what_generate_makes(make, streamed, limit):
    for image_id, question, wanted in zip(IDS, QUESTIONS, make(max_tokens=limit), strict=True):
        assert "".join(streamed(image_id, question, limit)) == wanted.text


def test_white_space_and_broken_letters_join_too(even, drawn, streamed, tokenizer):
    """Any bytes in any order, among them many spaces, new lines and letters of three bytes."""
    model = even(tokenizer(" \n 中é", add_special_tokens=False)["input_ids"], 6.0)
    model.language_model.lm_head.bias.data[tokenizer.eos_token_id] = -1e6
    swept = ""
    for seed in range(20):
        (wanted,) = drawn([100], model=model, max_tokens=60, seed=seed)
        sampling = {"temperature": 1.0, "top_p": 1.0, "seed": seed}
        assert "".join(streamed(100, None, 60, model=model, **sampling)) == wanted.text
        swept += wanted.text
    assert set(" \n中é\ufffd") < set(swept)


def test_no_piece_is_empty_and_there_are_several(streamed, chatty):
    pieces = list(streamed(100, None, 60, model=chatty))
    assert len(pieces) > 1
    assert all(pieces)


def test_a_seed_streams_the_text_that_it_generates(streamed, model, prompt_format, store):
    sampling = {"temperature": 1.5, "top_p": 0.9, "seed": 4}
    (wanted,) = generate(
        model, prompt_format, store, [100], [None], max_tokens=LIMIT, batch_size=1,
        description="test", sampling=Sampling(**sampling),
    )  # fmt: skip
    assert "".join(streamed(100, None, **sampling)) == wanted.text


def test_pieces_come_while_the_text_is_made(streamed, chatty, monkeypatch):
    """The model waits, after a few tokens, for whoever reads."""
    read = threading.Event()
    count = itertools.count()

    def wait(*_):
        assert next(count) < 50 or read.wait(60)

    chatty.language_model.register_forward_pre_hook(wait)
    pieces = streamed(100, None, 60, model=chatty)
    assert next(pieces)
    read.set()
    assert "".join(pieces)


def test_who_stops_reading_stops_the_model(streamed, chatty):
    made = []
    closed = threading.Event()

    def wait(*_):
        made.append(None)
        assert len(made) < 50 or closed.wait(60)

    chatty.language_model.register_forward_pre_hook(wait)
    pieces = streamed(100, None, 150, model=chatty)
    next(pieces)
    # Closing waits for the model, so the model is let go a moment after it began.
    threading.Timer(0.5, closed.set).start()
    pieces.close()
    assert streaming_threads() == []
    assert len(made) <= 51


@pytest.mark.parametrize("after", [0, 3])
def test_an_error_while_generating_reaches_who_reads(streamed, make_model, after):
    model = make_model()
    count = itertools.count()

    def fail(*_):
        if next(count) == after:
            raise RuntimeError("out of memory")

    model.language_model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(streamed(100, None, model=model))
    assert streaming_threads() == []


def test_streaming_leaves_training_mode_before(make, streamed, model):
    wanted = make([100], [""])[0].text
    model.train()
    assert "".join(streamed(100, "")) == wanted


# A table of positions


def with_table(positions):
    """GPT-2 with a table of so many positions, all of whose rows are those of a longer table."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = dataclasses.replace(FAMILIES["GPT2"], sizes={"tie_word_embeddings": False})
        model = AutoModelForCausalLM.from_config(config.config())
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        table = model.transformer.wpe.weight.data[:positions].clone()
    model.transformer.wpe = torch.nn.Embedding.from_pretrained(table)
    return CaptionModel(seeded_projector("mlp", 8, 64, 0), model.requires_grad_(False).eval())


def test_a_text_ends_where_the_models_positions_end(make, prompt_format):
    given = 4 + max(len(ids) for ids in prompt_format.prompts(QUESTIONS))
    wanted = make(model=with_table(256), max_tokens=8, batch_size=1)
    assert make(model=with_table(given + 8), max_tokens=8, batch_size=1) == wanted
    assert any(g.num_tokens > 2 for g in wanted)
    found = make(model=with_table(given + 2), max_tokens=8)
    for short, long in zip(found, wanted, strict=True):
        assert long.text.startswith(short.text)
        assert short.num_tokens == min(2, long.num_tokens)
        assert short.stopped == (long.stopped and long.num_tokens <= 2)
    with pytest.raises(SettingsError, match=rf"has {given} positions, .* take {given}\. Ask"):
        make(model=with_table(given), max_tokens=8)
