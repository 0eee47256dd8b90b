import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cache.errors import MissingImageError, SettingsError, SpecMismatchError
from eval.ask import main
from eval.chat.answering import TOP_P, cached_features, stream_answer
from eval.chat.encoder import RunEncoder, read_picture
from eval.runs import load_run, open_run
from tests.eval.picture_world import LIMITS, TRAIN, make_picture_world
from tests.pipeline.conftest import draw_jpeg
from train.model.generate import Sampling, generate, stream
from workspace.errors import StageError

pytestmark = pytest.mark.slow("starts the command for many tests")

ROOT = Path(__file__).parents[2]
QUESTIONS = ["What is on the dog", "how many", "where"]
FINETUNE, PRETRAIN = Path("runs/finetune"), Path("runs/pretrain")


@pytest.fixture(scope="module")
def picture_world(tmp_path_factory, phi_dir):
    return make_picture_world(tmp_path_factory.mktemp("picture_world"), phi_dir)


@pytest.fixture(autouse=True)
def _in_folder(picture_world, monkeypatch):
    monkeypatch.chdir(picture_world.workspace.root)


@pytest.fixture(scope="module")
def runs(picture_world):
    folder = picture_world.workspace.root / "runs"
    return {stage: load_run(open_run(folder / stage)) for stage in ("finetune", "pretrain")}


@pytest.fixture
def run(capsys, monkeypatch):
    """Call the command, and return its exit code, output and error text."""

    def run(*arguments, question=None):
        asked = [] if question is None else [question]
        monkeypatch.setattr(sys, "argv", ["ask", *map(str, arguments), *asked])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    on_termination = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, on_termination)


def generated(trained, image_id, question, max_tokens, sampling=None):
    """The text that the evaluation would make from the cached features."""
    from cache import FeatureStore

    (made,) = generate(
        trained.model, trained.prompt_format, FeatureStore("data/features"), [image_id], [question],
        max_tokens=max_tokens, batch_size=1, description="test", sampling=sampling,
    )  # fmt: skip
    return made.text


# What it says


@pytest.mark.parametrize("question", QUESTIONS)
def test_an_answer_is_what_the_evaluation_generates(run, runs, question):
    texts = set()
    for image_id in TRAIN:
        wanted = generated(runs["finetune"], image_id, question, LIMITS["answer_tokens"])
        done = run("--run", FINETUNE, "--image-id", image_id, question=question)
        assert done == (0, f"{wanted}\n", "")
        texts.add(wanted)
    assert len(texts) > 1, "the images matter"


def test_without_a_question_a_run_that_answers_is_asked_for_a_caption(run, runs):
    prompt = LIMITS["caption_question"]
    wanted = generated(runs["finetune"], 2, prompt, LIMITS["caption_tokens"])
    assert run("--run", FINETUNE, "--image-id", 2) == (0, f"{wanted}\n", "")
    assert run("--run", FINETUNE, "--image-id", 2, question="  ") == (0, f"{wanted}\n", "")


def test_stage_1_captions_right_after_the_patches(run, runs):
    wanted = generated(runs["pretrain"], 2, None, LIMITS["caption_tokens"])
    assert run("--run", PRETRAIN, "--image-id", 2) == (0, f"{wanted}\n", "")


def test_a_picture_file_gives_the_answer_of_its_cached_features(run, tmp_path):
    for image_id in TRAIN:
        path = tmp_path / f"{image_id}.any"
        path.write_bytes(draw_jpeg(image_id))
        by_file = run("--run", FINETUNE, "--image", path, question="where")
        assert by_file == run("--run", FINETUNE, "--image-id", image_id, question="where")
        assert by_file[0] == 0


def test_the_features_of_a_file_equal_the_cached_ones_up_to_rounding(runs, picture_world):
    encoder = RunEncoder(runs["finetune"])
    for image_id in TRAIN:
        found = encoder.encode(draw_jpeg(image_id), "picture")
        assert found.dtype == np.float16
        np.testing.assert_allclose(
            found.astype(float), picture_world.store.gather([image_id])[0], rtol=2e-3, atol=2e-3
        )


def test_the_tower_is_loaded_once(runs):
    encoder = RunEncoder(runs["finetune"])
    assert encoder.load() is encoder.load()


def test_earlier_turns_are_read(runs, picture_world):
    patches = picture_world.store.gather([1])[0]
    turns = [("how many", "the dog")]
    trained = runs["finetune"]
    end = trained.tokenizer.eos_token
    said = f"Instruct: how many\nOutput: the dog{end}Instruct: where\nOutput:"
    prompt_ids = trained.tokenizer(said, add_special_tokens=False)["input_ids"]
    seen = []
    embed = trained.model.language_model.get_input_embeddings()
    hook = embed.register_forward_hook(lambda m, args, out: seen.append(args[0].flatten().tolist()))
    pieces = list(stream_answer(trained, patches, "where", turns=turns))
    hook.remove()
    assert seen[0] == prompt_ids
    assert "".join(pieces) != "".join(stream_answer(trained, patches, "where"))


def test_sampling_is_decided_by_the_seed(run, runs):
    def drawn(*arguments):
        code, text, errors = run("--run", FINETUNE, "--image-id", 1, *arguments, question="where")
        assert (code, errors) == (0, "")
        return text

    sampling = Sampling(temperature=1.5, top_p=TOP_P, seed=3)
    wanted = generated(runs["finetune"], 1, "where", LIMITS["answer_tokens"], sampling)
    assert drawn("--temperature", 1.5, "--seed", 3) == f"{wanted}\n"
    assert len({drawn("--temperature", 1.5, "--seed", seed) for seed in range(4)}) > 1
    assert drawn("--temperature", 0.001) == drawn()


def test_the_answer_is_printed_piece_by_piece(runs, picture_world, monkeypatch):
    patches = picture_world.store.gather([1])[0]
    pieces = list(stream_answer(runs["finetune"], patches, "where", max_tokens=40))
    assert len(pieces) > 1
    printed = []
    monkeypatch.setattr(
        "builtins.print", lambda *text, **settings: printed.append((text, settings))
    )
    monkeypatch.setattr("eval.ask.open_run", lambda folder: runs["finetune"])
    monkeypatch.setattr("eval.ask.load_run", lambda run: run)
    monkeypatch.setattr(sys, "argv", ["ask", "--run", "x", "--image-id", "1", "where"])
    with pytest.raises(SystemExit):
        main()
    short = list(stream_answer(runs["finetune"], patches, "where"))
    assert printed[:-1] == [((piece,), {"end": "", "flush": True}) for piece in short]


# What it refuses


def test_a_question_to_stage_1_is_refused(run):
    code, text, errors = run("--run", PRETRAIN, "--image-id", 1, question="where")
    assert (code, text) == (2, "")
    assert errors.startswith("error: runs/pretrain: has no adapter")
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"layer": -1}, 1),
        ({"model": "nowhere.json"}, 2),
        ({"pretrained": "nowhere.safetensors"}, 2),
        ({"model": "external", "pretrained": "my_features"}, 2),
    ],
)
def test_another_tower_than_the_runs_is_refused(run, picture_world, tmp_path, changes, code):
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", FINETUNE, copy], check=True)
    (copy / "params.yaml").write_text(picture_world.params(encoder=changes).text)
    picture_world.params()
    picture = Path("data/raw/train/1.jpg")
    found, text, errors = run("--run", copy, "--image", picture, question="where")
    assert (found, text, errors.count("\n")) == (code, "", 1)


def test_the_error_names_both_towers(runs, picture_world, tmp_path):
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", FINETUNE, copy], check=True)
    (copy / "params.yaml").write_text(picture_world.params(encoder={"layer": -1}).text)
    picture_world.params()
    with pytest.raises(SpecMismatchError) as caught:
        RunEncoder(load_run(open_run(copy))).load()
    wanted = picture_world.store.fingerprint[:12]
    assert wanted in str(caught.value)
    assert "fingerprint" in str(caught.value)
    assert str(copy) in str(caught.value)


def test_the_device_of_the_features_does_not_matter(picture_world, tmp_path):
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", FINETUNE, copy], check=True)
    (copy / "params.yaml").write_text(picture_world.params(encoder={"device": "cuda:7"}).text)
    picture_world.params()
    assert (
        RunEncoder(load_run(open_run(copy))).load().spec.fingerprint
        == picture_world.store.fingerprint
    )


def test_features_of_another_store_are_refused(runs, workspace):
    """The fixture has moved to a folder whose features are of another tower."""
    with pytest.raises(SpecMismatchError, match=r"data/features: gives features of fingerprint"):
        cached_features(runs["finetune"], 100)


def noise(size):
    data = io.BytesIO()
    Image.effect_noise(size, 50).save(data, "PNG")
    return data.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "none of the formats"),
        (b"no picture at all", "none of the formats"),
        (draw_jpeg(1)[:300], "."),
        (noise((64, 64))[:200], "."),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "none of the formats"),
    ],
    ids=["empty", "text", "cut jpeg", "cut png", "eps"],
)
def test_a_broken_picture_is_refused_in_one_line(run, tmp_path, content, reason):
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    code, text, errors = run("--run", FINETUNE, "--image", path, question="where")
    assert (code, text, errors.count("\n")) == (1, "", 1)
    assert errors.startswith(f"error: {path}: not a readable picture: ")
    assert reason in errors


def test_a_huge_picture_is_refused(runs, monkeypatch):
    monkeypatch.setattr("pipeline.images.decode.MAX_PIXELS", 64 * 64 - 1)
    with pytest.raises(StageError, match=r"photo: .*64 x 64 pixels, wanted from 1 to 4095"):
        RunEncoder(runs["finetune"]).encode(noise((64, 64)), "photo")


def test_a_file_too_large_to_be_a_picture_is_not_read(run, tmp_path):
    path = tmp_path / "large.jpg"
    with path.open("wb") as file:
        file.truncate(2**28 + 1)
    code, text, errors = run("--run", FINETUNE, "--image", path)
    assert (code, text) == (1, "")
    assert errors == f"error: {path}: has more than {2**28} bytes, wanted a picture.\n"


def test_folders_and_missing_files_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none.jpg", Path(os.devnull)):
        with pytest.raises(SettingsError, match=rf"^{path}: no such file"):
            read_picture(path)


@pytest.mark.parametrize("image_id", [0, 99, -1, 2**63, 10**30])
def test_a_missing_image_is_named(runs, run, image_id):
    with pytest.raises(MissingImageError, match=f"data/features: holds no image {image_id}"):
        cached_features(runs["finetune"], image_id)


def test_a_question_too_long_for_the_model_is_refused(run, runs):
    most = runs["finetune"].model.language_model.config.max_position_embeddings
    question = "x" * most
    code, text, errors = run("--run", FINETUNE, "--image-id", 1, question=question)
    assert (code, text, errors.count("\n")) == (2, "", 1)
    assert f"the language model reads {most}" in errors


def test_the_longest_question_that_fits_is_answered(runs, picture_world):
    trained, patches = runs["finetune"], picture_world.store.gather([1])[0]
    most = trained.model.language_model.config.max_position_embeddings
    question = "\x00" * 300
    while True:
        length = len(trained.prompt_format.prompts([question])[0]) + len(patches)
        if length + LIMITS["answer_tokens"] <= most:
            break
        question = question[1:]
    assert length + LIMITS["answer_tokens"] == most
    list(stream_answer(trained, patches, question))
    with pytest.raises(SettingsError, match="Ask something shorter"):
        stream_answer(trained, patches, question + "\x00")


def test_a_question_of_invalid_bytes_is_refused(run):
    code, text, errors = run("--run", FINETUNE, "--image-id", 1, question="wo\udcffis")
    assert (code, text, errors) == (
        2,
        "",
        "error: the question has bytes that are not valid text.\n",
    )


@pytest.mark.parametrize(
    "wrong",
    [
        ["--temperature", "0"],
        ["--temperature", "nan"],
        ["--temperature", "1", "--seed", "-1"],
        ["--temperature", "warm"],
        ["--image", "data/raw/train/1.jpg"],
        ["--run", "data"],
        ["a question", "another"],
    ],
)
def test_a_wrong_call_ends_with_2(run, wrong):
    code, text, errors = run("--run", FINETUNE, "--image-id", "1", *wrong)
    assert (code, text) == (2, "")
    assert "error: " in errors


def test_an_image_has_to_be_named(run):
    assert run("--run", FINETUNE)[0] == 2


# How it ends


WATCHED = """
import os, sys
from eval import ask
from eval.chat import answering
stream = answering.stream
def closing(*arguments, **settings):
    os.close(READER)
    return stream(*arguments, **settings)
answering.stream = closing
try:
    ask.main()
finally:
    assert {"pipeline.encoding.encoder", "open_clip"}.isdisjoint(sys.modules)
"""


def test_a_cached_image_imports_no_vision_tower_and_a_closed_pipe_is_no_error():
    """The reader closes the pipe before the first word."""
    reader, writer = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-c", WATCHED.replace("READER", str(reader)), "--run", str(FINETUNE),
         "--image-id", "1", "where"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=writer, stderr=subprocess.PIPE, text=True, pass_fds=[reader],
    ) as process:  # fmt: skip
        os.close(reader)
        os.close(writer)
        assert process.communicate(timeout=120)[1] == ""
        assert process.returncode == 0


def test_ctrl_c_while_it_answers_ends_with_130(run, monkeypatch):
    def interrupted(*arguments, **settings):
        with contextlib.closing(stream(*arguments, **settings | {"max_tokens": 200})) as pieces:
            yield next(pieces)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("eval.chat.answering.stream", interrupted)
    code, text, errors = run("--run", FINETUNE, "--image-id", 1, question="where")
    assert code == 130
    assert text
    assert errors == "error: interrupted; run the same command again\n"
    assert not [t for t in threading.enumerate() if t.name.startswith("stream")]
