"""Both stages, evaluation and questions in the format of a chat template."""

import json
import shutil
from pathlib import Path

import pytest

from eval.chat.answering import cached_features, stream_answer
from eval.evaluate import evaluate
from eval.runs import load_run, open_run, open_stages
from tests.train.data.chat_tokenizers import chat_tokenizer
from train.finetune import finetune
from train.pretrain import pretrain
from train.settings import LlmSettings
from workspace.errors import StageError

RUN = Path("runs/finetune")


@pytest.fixture
def chat_world(world, tmp_path):
    """The world of the evaluation, beside a Phi whose tokenizer has a chat template."""
    folder = Path(shutil.copytree(world.workspace.phi_dir, tmp_path / "phi with a template"))
    chat_tokenizer("ChatML with another EOS").save_pretrained(folder)
    world.now = {"llm": {"model": str(folder)}}
    world.write_run("pretrain", 1, **world.now["llm"])
    world.write_run("finetune", 2, **world.now["llm"])
    world.params(**world.now)
    return world


def answer(question):
    trained = load_run(open_run(RUN))
    patches_PD = cached_features(trained, 100)
    return trained, "".join(stream_answer(trained, patches_PD, question))


def forget_the_format(stage):
    """Make a run's provenance that of a run from before there were formats."""
    path = Path("runs", stage, "provenance.json")
    values = json.loads(path.read_text())
    del values["language_model"]["prompt"]
    path.write_text(json.dumps(values))


def test_all_stages_take_the_chat_template(chat_world):
    pretrain(chat_world.params(**chat_world.now))
    finetune(chat_world.params(**chat_world.now))
    evaluate(chat_world.params(**chat_world.now))
    trained, said = answer("where")
    prompts = trained.prompt_format
    assert prompts.name == "chat"
    scores = json.loads(Path("reports/eval.json").read_text())
    assert scores["answers"]["count"] > 0
    provenances = [Path("runs", stage, "provenance.json") for stage in ("pretrain", "finetune")]
    entries = [json.loads(path.read_text())["language_model"]["prompt"] for path in provenances]
    assert entries == [prompts.identity()["prompt"]] * 2
    read = []
    embed = trained.model.embed_text

    def recording(token_ids):
        read.extend(token_ids.tolist())
        return embed(token_ids)

    trained.model.embed_text = recording
    turns = [("what", said)]
    patches_PD = cached_features(trained, 100)
    list(stream_answer(trained, patches_PD, "where", turns=turns))
    assert read == [*prompts.lead, *prompts.dialogue_prompt(turns, "where")]


def test_a_run_in_another_format_is_refused_with_what_to_set(chat_world):
    llm = chat_world.params(**chat_world.now).section("llm", LlmSettings)
    for prompt in ("phi", "plain"):
        other = LlmSettings(**{**vars(llm), "prompt": prompt})
        with pytest.raises(StageError, match=rf"format chat \w+, llm\.prompt gives {prompt}.*chat"):
            open_stages(other, chat_world.store)
    with pytest.raises(StageError, match=r"runs/pretrain/provenance\.json: .*llm\.prompt: chat"):
        finetune(chat_world.params(llm={**chat_world.now["llm"], "prompt": "plain"}))


def test_a_run_from_before_there_were_formats_stays_in_phis(chat_world):
    """Even if `auto` stands for the chat template of its tokenizer today."""
    forget_the_format("finetune")
    assert open_run(RUN).prompt_format.name == "phi"
    forget_the_format("pretrain")
    llm = chat_world.params(**chat_world.now).section("llm", LlmSettings)
    with pytest.raises(StageError, match=r"format phi, llm\.prompt gives chat .*llm\.prompt: phi"):
        open_stages(llm, chat_world.store)
    opened = open_stages(LlmSettings(**{**vars(llm), "prompt": "phi"}), chat_world.store)
    assert {run.prompt_format.name for run in opened.values()} == {"phi"}


def test_another_template_is_another_language_model(chat_world):
    folder = Path(chat_world.now["llm"]["model"])
    tokenizer = chat_tokenizer("ChatML with another EOS")
    template = tokenizer.chat_template.replace("helpful", "unhelpful")
    Path(folder, "chat_template.jinja").write_text(template)
    with pytest.raises(StageError, match=r"prompt format chat \w+, llm\.prompt gives chat"):
        open_run(RUN)


def test_the_tokens_before_the_patches_count_towards_the_models_limit(chat_world):
    trained, _ = answer("where")
    most = trained.model.language_model.config.max_position_embeddings
    patches_PD = cached_features(trained, 100)
    prompt = trained.prompt_format.dialogue_prompt([], "where")
    room = most - len(trained.prompt_format.lead) - len(patches_PD) - len(prompt)
    list(stream_answer(trained, patches_PD, "where", max_tokens=room))
    with pytest.raises(Exception, match="Ask something shorter"):
        stream_answer(trained, patches_PD, "where", max_tokens=room + 1)
