import itertools
import math
import threading

import pytest
import torch
from transformers import GenerationConfig

from train.data.prompts import encode, question_text
from train.model.generate import Sampling, generate, stream

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
    assert tokenizer.decode(seen) == f"a{tokenizer.eos_token}b"
    assert tokenizer.eos_token_id not in seen


# Sampling


@pytest.fixture
def drawn(model, tokenizer, store):
    """Make one text an image by drawing tokens."""

    def drawn(image_ids=IDS, model=model, max_tokens=LIMIT, **sampling):
        values = {"temperature": 1.0, "top_p": 1.0, "seed": 0} | sampling
        return generate(
            model, tokenizer, store, image_ids, [""] * len(image_ids), max_tokens=max_tokens,
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
    greedy = make(IDS, [""] * len(IDS))
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
def streamed(model, tokenizer, store):
    """Stream a text about an image."""

    def streamed(image_id, prompt, max_tokens=LIMIT, model=model, tokenizer=tokenizer, **sampling):
        return stream(
            model, tokenizer, store.gather([image_id])[0], encode([prompt], tokenizer)[0],
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
    for image_id, prompt, wanted in zip(IDS, PROMPTS, make(max_tokens=limit), strict=True):
        assert "".join(streamed(image_id, prompt, limit)) == wanted.text


def test_white_space_and_broken_letters_join_too(even, drawn, streamed, tokenizer):
    """Any bytes in any order, among them many spaces, new lines and letters of three bytes."""
    model = even(tokenizer(" \n 中é", add_special_tokens=False)["input_ids"], 6.0)
    model.language_model.lm_head.bias.data[tokenizer.eos_token_id] = -1e6
    swept = ""
    for seed in range(20):
        (wanted,) = drawn([100], model=model, max_tokens=60, seed=seed)
        sampling = {"temperature": 1.0, "top_p": 1.0, "seed": seed}
        assert "".join(streamed(100, "", 60, model=model, **sampling)) == wanted.text
        swept += wanted.text
    assert set(" \n中é\ufffd") < set(swept)


def test_no_piece_is_empty_and_there_are_several(streamed, chatty):
    pieces = list(streamed(100, "", 60, model=chatty))
    assert len(pieces) > 1
    assert all(pieces)


def test_a_seed_streams_the_text_that_it_generates(streamed, model, tokenizer, store):
    sampling = {"temperature": 1.5, "top_p": 0.9, "seed": 4}
    (wanted,) = generate(
        model, tokenizer, store, [100], [""], max_tokens=LIMIT, batch_size=1,
        description="test", sampling=Sampling(**sampling),
    )  # fmt: skip
    assert "".join(streamed(100, "", **sampling)) == wanted.text


def test_pieces_come_while_the_text_is_made(streamed, chatty, monkeypatch):
    """The model waits, after a few tokens, for whoever reads."""
    read = threading.Event()
    count = itertools.count()

    def wait(*_):
        assert next(count) < 50 or read.wait(60)

    chatty.language_model.register_forward_pre_hook(wait)
    pieces = streamed(100, "", 60, model=chatty)
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
    pieces = streamed(100, "", 150, model=chatty)
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
        list(streamed(100, "", model=model))
    assert streaming_threads() == []


def test_streaming_leaves_training_mode_before(make, streamed, model):
    wanted = make([100], [""])[0].text
    model.train()
    assert "".join(streamed(100, "")) == wanted
