"""An exported run gives from pixels the answers that the run gives from cached features."""

import json
import re

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from cache.errors import SettingsError, SpecMismatchError
from eval import export as module
from eval.export import atomic_folder, main
from tests.eval.llava.exported_run import (
    BFLOAT16,
    EVALUATE,
    FLOAT16,
    KERNELS,
    QUESTIONS,
    Made,
    distance,
    inputs_of,
    our_answers,
    our_logits,
    their_answers,
    their_logits,
)
from tests.pipeline.conftest import TINY, draw_jpeg
from tests.train.model.families import FAMILIES
from train.model.generate import generate
from train.model.language_model import load_language_model
from train.settings import LlmSettings
from workspace.errors import StageError

pytestmark = pytest.mark.usefixtures("copied_code")


@pytest.fixture
def made(tmp_path, phi_dir):
    return Made(tmp_path, phi_dir)


RUNS = {
    "none": {},
    "nf4": {"llm": {"quantize": "nf4"}},
    "last layer": {"layer": -1},
    "bf16": {"llm": {"quantize": "nf4", "dtype": "bf16"}},
    "fp16": {"llm": {"quantize": "nf4", "dtype": "fp16"}},
    "bf16 tower": {"llm": {"dtype": "bf16"}, "precision": "bf16"},
}


@pytest.fixture(scope="module", params=RUNS)
def exported(request, tmp_path_factory, phi_dir):
    made = Made(tmp_path_factory.mktemp("exported"), phi_dir)
    made.name = request.param
    return made.write(**RUNS[request.param]).export()


def load(out):
    model, loading = AutoModelForImageTextToText.from_pretrained(
        out, trust_remote_code=True, output_loading_info=True
    )
    assert not any(loading.values()), loading
    return model, AutoProcessor.from_pretrained(out, trust_remote_code=True)


def test_logits_from_pixels_are_those_from_the_features(exported):
    model, processor = load(exported.out)
    kernels, float16 = (BFLOAT16,) * 2 if "16" in exported.name else (KERNELS, FLOAT16)
    for image_id, question in enumerate(QUESTIONS):
        found = their_logits(model, inputs_of(processor, [image_id], [question]))
        exact = our_logits(exported, exported.features.unrounded(image_id), question)
        assert distance(found, exact) < kernels
        cached = torch.from_numpy(exported.features.gather([image_id]))
        assert distance(found, our_logits(exported, cached, question)) < float16


@pytest.mark.parametrize("exported", ["none"], indirect=True)
@pytest.mark.parametrize("broken", ["bias", "layer", "class token", "lora", "projector"])
def test_every_part_changes_the_logits(exported, broken):
    model, processor = load(exported.out)
    if broken == "bias":
        model.lm_head.bias.data.zero_()
    if broken == "layer":
        model.config.vision_feature_layer = -1
    if broken == "class token":
        model.model.vision_tower.embeddings.class_embedding.data.zero_()
    if broken == "lora":
        base = load_language_model(
            exported.trained.params.section("llm", LlmSettings), torch.device("cpu")
        )
        model.model.language_model.load_state_dict(base.model.state_dict())
    if broken == "projector":
        model.model.multi_modal_projector.linear_2.bias.data.zero_()
    found = their_logits(model, inputs_of(processor, [0], QUESTIONS[:1]))
    wanted = our_logits(exported, exported.features.unrounded(0), QUESTIONS[0])
    assert distance(found, wanted) > 10 * KERNELS


# Not bf16: random weights decide by less than it rounds.
@pytest.mark.parametrize("exported", ["none", "nf4", "last layer"], indirect=True)
def test_greedy_answers_are_the_same_in_a_batch_too(exported):
    model, processor = load(exported.out)
    assert their_answers(model, processor) == our_answers(exported)


@pytest.mark.parametrize("exported", ["fp16"], indirect=True)
def test_a_model_trained_in_fp16_is_saved_in_float32(exported):
    """Transformers' attention would overflow in float16."""
    model, _ = load(exported.out)
    assert model.dtype == torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("exported", ["bf16"], indirect=True)
def test_tower_and_projector_stay_in_float32(exported):
    model, _ = load(exported.out)
    assert model.dtype == torch.bfloat16
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}
    text = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    assert {parameter.dtype for parameter in text} == {torch.bfloat16}


@pytest.mark.parametrize("exported", ["bf16 tower"], indirect=True)
def test_a_tower_that_encoded_in_bf16_stays_in_bf16(exported):
    model, _ = load(exported.out)
    assert {p.dtype for p in model.model.vision_tower.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.model.multi_modal_projector.parameters()} == {torch.float32}


@pytest.mark.parametrize("exported", ["none"], indirect=True)
def test_the_image_token_takes_a_row_that_no_token_has_and_is_never_made(exported):
    model, processor = load(exported.out)
    tokenizer = exported.trained.tokenizer
    assert processor.image_token_id == model.config.image_token_id == len(tokenizer)
    rows = model.get_input_embeddings().num_embeddings
    assert rows == exported.trained.model.language_model.config.vocab_size
    assert model.generation_config.suppress_tokens == list(range(len(tokenizer), rows))


@pytest.mark.parametrize("exported", ["none"], indirect=True)
def test_transformers_own_classes_load_it_but_for_the_bias(exported, caplog):
    model, loading = LlavaForConditionalGeneration.from_pretrained(
        exported.out, output_loading_info=True
    )
    assert loading["unexpected_keys"] == {"lm_head.bias"}
    assert not loading["missing_keys"]
    processor = LlavaProcessor.from_pretrained(exported.out)
    assert type(processor.image_processor).__name__ == "CLIPImageProcessor"
    with torch.inference_mode():
        model(**inputs_of(processor, [0], QUESTIONS[:1]))


@pytest.mark.parametrize("exported", ["none"], indirect=True)
def test_the_snippet_of_the_model_card_runs(exported, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(exported.out)
    (exported.out / "picture.jpg").write_bytes(draw_jpeg(5))
    card = (exported.out / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(compile(snippet, "README.md", "exec"), {})
    wanted = generate(
        exported.trained.model, exported.trained.prompt_format, exported.features, [5],
        [EVALUATE["caption_question"]],
        max_tokens=EVALUATE["answer_tokens"], batch_size=1, description="test",
    )  # fmt: skip
    assert capsys.readouterr().out.strip() == wanted[0].text


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_run_of_stage_1_captions_and_so_does_a_stage_2_without_conversations(
    made, monkeypatch, capsys, stage
):
    made.write(stage="pretrain")
    if stage == "finetune":
        made.run = made.run.rename(made.run.with_name("finetune"))
        path = made.run / "provenance.json"
        untrained = {"untrained": "no conversations", "start_projector_sha256": "0" * 64}
        path.write_text(json.dumps(json.loads(path.read_text()) | untrained))
    made.export()
    capsys.readouterr()
    monkeypatch.chdir(made.out)
    (made.out / "picture.jpg").write_bytes(draw_jpeg(5))
    (snippet,) = re.findall(r"```python\n(.*?)```", (made.out / "README.md").read_text(), re.DOTALL)
    exec(compile(snippet, "README.md", "exec"), {})
    (wanted,) = generate(
        made.trained.model, made.trained.prompt_format, made.features, [5], [None],
        max_tokens=EVALUATE["caption_tokens"], batch_size=1, description="test",
    )  # fmt: skip
    assert capsys.readouterr().out.strip() == wanted.text
    assert not (made.out / "chat_template.jinja").exists()


@pytest.fixture
def no_language_model(monkeypatch):
    def load_run(folder):
        raise AssertionError("the language model is loaded")

    monkeypatch.setattr(module, "load_run", load_run)


@pytest.mark.parametrize("kind", ["linear", "resblock"])
@pytest.mark.usefixtures("no_language_model")
def test_another_projector_is_refused_before_the_language_model_is_loaded(made, kind):
    made.write(kind=kind)
    with pytest.raises(StageError, match=f"projector of kind '{kind}'.*projector.kind to mlp"):
        made.export()
    assert not made.out.exists()


@pytest.mark.usefixtures("no_language_model")
def test_a_pooled_run_is_refused_before_the_language_model_is_loaded(made):
    made.write(pool=2)
    with pytest.raises(StageError, match=r"squares of 2 x 2 patches.*projector.pool to 1"):
        made.export()
    assert not made.out.exists()


@pytest.mark.usefixtures("no_language_model")
def test_a_language_model_that_llava_cannot_represent_is_refused(tmp_path, phi_dir):
    made = Made(tmp_path, FAMILIES["Gemma2"].write(tmp_path / "gemma2", phi_dir))
    made.write()
    with pytest.raises(StageError, match=r"is of type 'gemma2'.*soft cap of logits"):
        made.export()
    assert not made.out.exists()


@pytest.mark.usefixtures("no_language_model")
@pytest.mark.parametrize("there", ["file", "folder"])
def test_existing_files_are_never_overwritten(made, there):
    made.write()
    out = made.root / "out"
    kept = out if there == "file" else out / "kept"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    with pytest.raises(SettingsError, match="exists already"):
        made.export()
    assert kept.read_text() == "mine"


def test_an_empty_folder_is_filled_and_a_half_one_never_seen(made, monkeypatch):
    made.write()
    (made.root / "out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_model", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            made.export()
    assert not list((made.root / "out").iterdir())
    assert not list(made.root.glob(".out*"))
    made.export()
    assert (made.out / "model.safetensors").is_file()


def test_another_tower_than_the_runs_is_refused(made):
    made.write()
    other = TINY | {"quick_gelu": False}
    (made.root / "clip.json").write_text(json.dumps(other))
    with pytest.raises(SpecMismatchError, match="vision tower"):
        made.export()


def test_a_folder_without_a_run_is_a_usage_error(made, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["export", "--run", str(made.root), str(made.root / "out")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "is no run" in capsys.readouterr().err


def test_an_export_touches_nothing_beside_its_folder(tmp_path):
    """Not even files that have the name of the temporary folder."""
    mine = tmp_path / ".exp.partial"
    mine.mkdir()
    (mine / "precious").write_text("kept")
    with atomic_folder(tmp_path / "exp") as folder:
        (folder / "a").write_text("x")
    with pytest.raises(OSError, match="full"), atomic_folder(tmp_path / "other"):
        raise OSError("full")
    assert (mine / "precious").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".exp.partial", "exp"]
    assert (tmp_path / "exp").stat().st_mode & 0o777 == mine.stat().st_mode & 0o777
