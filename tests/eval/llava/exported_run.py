"""A finished run whose features are computed on demand, its export, and the logits of both."""

import contextlib
import io
import json

import numpy as np
import torch
from PIL import Image

from eval.export import export
from eval.runs import load_run, open_run
from pipeline.encoding.encoder import load_encoder
from pipeline.images.decode import decode_for
from pipeline.settings import EncoderSettings
from pipeline.towers.tower import patch_tokens
from tests.conftest import HIDDEN, Workspace
from tests.pipeline.conftest import TINY, draw_jpeg
from train.data.prompt_formats import prompt_format
from train.model.fingerprint import language_model_identity
from train.model.generate import generate
from train.model.language_model import add_lora, load_language_model, load_tokenizer
from train.model.model_files import read_config
from train.model.projector import seeded_projector
from train.run import RunDirectory, provenance
from train.settings import LlmSettings, LoraSettings

QUESTIONS = ["What is in the box", "how many", "yes no"]
EVALUATE = {
    "caption_images": 99,
    "questions": 99,
    "pope_images": 99,
    "caption_question": "What is in the box",
    "caption_tokens": 6,
    "answer_tokens": 7,
    "max_text_tokens": 64,
    "batch_size": 3,
    "exclude_contaminated": False,
}

KERNELS = 1e-5
"""Same numbers in another order of operations, in float32: relative to the largest logit."""
FLOAT16 = 2**-11
"""Half of the last digit of a cached feature, which ours reads and theirs does not."""
BFLOAT16 = 2**-6
"""A few times the last digit of a weight and of every activation of the language model."""


class Pictures:
    """Computes features of drawn pictures on demand; the id of a picture is its seed."""

    def __init__(self, encoder):
        self.encoder, self.spec = encoder, encoder.spec
        self.fingerprint = encoder.spec.fingerprint

    def gather(self, image_ids, out=None):
        pixels = [decode_for(draw_jpeg(int(i)), self.spec) for i in image_ids]
        return self.encoder.encode(torch.from_numpy(np.stack(pixels)))

    def unrounded(self, image_id):
        """Return features [1, P, D] as they are before the cast to float16."""
        pixels = decode_for(draw_jpeg(image_id), self.spec)
        x = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2).float() / 255
        x = ((x - self.encoder._mean) / self.encoder._std).to(self.encoder._dtype)
        with torch.inference_mode():
            return patch_tokens(self.encoder._visual, x, self.spec.layer).float()


class Made:
    """A workspace with a run."""

    def __init__(self, root, phi_dir):
        self.root = root
        self.workspace = Workspace(root, phi_dir)

    def write(
        self, *, kind="mlp", pool=1, stage="finetune", llm=(), layer=-2, precision="fp32", tower=()
    ):
        """Write a run; `tower` is its encoder if that is not the tiny one of open_clip."""
        (self.root / "clip.json").write_text(json.dumps(TINY))
        encoder = {"model": "clip.json", "pretrained": "random", "layer": layer}
        encoder |= {"precision": precision, "batch_size": 4, "device": "cpu"} | dict(tower)
        with contextlib.chdir(self.root):
            params = self.workspace.params(
                encoder=encoder, evaluate=EVALUATE, llm=dict(llm), data={"source": "local"}
            )
            self.workspace.write_index([], [])
            self.features = Pictures(load_encoder(EncoderSettings(**encoder)))
            llm = params.section("llm", LlmSettings)
            prompts = prompt_format(llm, load_tokenizer(llm), read_config(llm.model))
            identity = language_model_identity(llm, prompts.tokenizer) | prompts.identity()
            made_from = provenance(self.features, torch.device("cpu"), language_model=identity)
            run = RunDirectory(stage, params, {"layer": layer, "kind": kind}, made_from)
            width = self.features.spec.width
            projector = seeded_projector(kind, width, HIDDEN, 3, pool)
            projector.save(run.files / "projector.safetensors")
            if stage == "finetune":
                self._write_adapter(llm, run.files / "adapter")
            run.publish({"loss": 2.5}, self.root / "reports" / f"{stage}.json")
        self.run = self.root / "runs" / stage
        return self

    def _write_adapter(self, llm, folder):
        model = load_language_model(llm, torch.device("cpu"))
        adapter = add_lora(model, LoraSettings(r=4, alpha=8, dropout=0.5), 1)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1, generator=generator)
        adapter.save_pretrained(folder, save_embedding_layers=False)

    def export(self):
        self.out = self.root / "out"
        with contextlib.chdir(self.root):
            export(self.run, self.out)
            self.trained = load_run(open_run(self.run))
        return self


def inputs_of(processor, image_ids, questions):
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        )
        for question in questions
    ]
    pictures = [Image.open(io.BytesIO(draw_jpeg(i))) for i in image_ids]
    return processor(
        images=pictures, text=texts, add_special_tokens=False, return_tensors="pt", padding=True
    )


@torch.inference_mode()
def our_logits(made, patches, question):
    """Logits [T, V] behind the patches, from the run itself."""
    model = made.trained.model.eval()
    prompts = made.trained.prompt_format
    lead, asked = torch.tensor(prompts.lead), torch.tensor(prompts.dialogue_prompt([], question))
    embeds = torch.cat(
        [model.embed_text(lead.long()), model.embed_patches(patches)[0], model.embed_text(asked)]
    )
    return model.language_model(inputs_embeds=embeds[None]).logits[0].float()


@torch.inference_mode()
def their_logits(model, inputs):
    return model(**inputs).logits[0].float()


def distance(found, wanted):
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def our_answers(made):
    """Return the texts that the run generates for the questions, one a picture."""
    generations = generate(
        made.trained.model, made.trained.prompt_format, made.features, range(len(QUESTIONS)),
        QUESTIONS,
        max_tokens=EVALUATE["answer_tokens"], batch_size=2, description="test",
    )  # fmt: skip
    return [generation.text for generation in generations]


@torch.inference_mode()
def their_answers(model, processor):
    """Return the texts that the exported model generates for the questions, in one batch."""
    inputs = inputs_of(processor, range(len(QUESTIONS)), QUESTIONS)
    token_ids = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(token_ids, skip_special_tokens=True)]
