"""A tiny world for the tests of training and evaluation: a Phi of two layers, its tokenizer, a
feature store, and a working directory as the stages before training leave it.

What needs torch is imported within its fixture: most other tests run without it.
"""

import csv
import hashlib
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cache import FeatureStore, Spec
from cache.cli.startup import OPENMP
from cache.files.atomic import sha256_of, write_text
from cache.shard import hash_rows, write_shard
from cache.store_index import ShardFile, StoreIndex
from tests.stand_in_gpu import process as stand_in_gpu
from workspace.settings import Params

# Before any test imports torch.
os.environ |= OPENMP | os.environ

PATCHES, WIDTH, HIDDEN, ROWS, EOS = 4, 8, 64, 512, "<|endoftext|>"
IMAGE_IDS = tuple(range(100, 140))
WORDS = "a red blue green cat dog on in the box What is where Instruct: Output: yes no how many"


def sign_weights(folder):
    """Let a run's provenance name the weights that are in its folder, as if it had made them."""
    from train.run import weights_of

    path = Path(folder, "provenance.json")
    values = json.loads(path.read_text()) | {"weights_sha256": weights_of(path.parent)}
    path.write_text(json.dumps(values))


def _heed_signals():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture(autouse=True, scope="session")
def _interruptible():
    """Heed what background jobs (SIGINT) and nohup (SIGHUP) ignore, and all that they start."""
    _heed_signals()


@pytest.fixture(autouse=True)
def _interruptible_again():
    """Heed signals after a test: a command that ran in this process ignores them at its end."""
    yield
    _heed_signals()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Run a test marked `stand_in_gpu` in a process that has one."""
    if "stand_in_gpu" not in pyfuncitem.keywords or stand_in_gpu.is_loaded():
        return None
    stand_in_gpu.check_there(pyfuncitem)
    return True


@pytest.fixture(scope="session")
def phi_dir(tmp_path_factory):
    """A checkpoint in Phi-2's layout: dropout 0.1, a bias in lm_head, more rows than tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("phi")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [WORDS] * 5,
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=[EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, unk_token=EOS
    )
    fast.save_pretrained(folder)
    torch.manual_seed(7)
    phi = PhiForCausalLM(
        PhiConfig(
            vocab_size=ROWS,
            hidden_size=HIDDEN,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=256,
            resid_pdrop=0.1,
            embd_pdrop=0.1,
            attention_dropout=0.1,
            bos_token_id=fast.eos_token_id,
            eos_token_id=fast.eos_token_id,
            pad_token_id=None,
            tie_word_embeddings=False,
        )
    )
    # Large enough that every position matters to every later logit.
    for parameter in phi.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    phi.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(phi_dir):
    from train.model.language_model import load_tokenizer
    from train.settings import LlmSettings

    return load_tokenizer(LlmSettings(model=str(phi_dir), quantize="none", dtype="fp32"))


@pytest.fixture(scope="session")
def prompt_format(tokenizer):
    """Phi-2's, of the tiny Phi."""
    from train.data.prompt_formats import phi_format

    return phi_format(tokenizer)


def write_store(root, image_ids=IMAGE_IDS, seed=0):
    """Write features of some images as two shards and an index; of one image, as one shard."""
    spec = Spec(
        format="patchcache/1", model="tiny", weights_sha256="0" * 64, activation="quick_gelu",
        layer=-2, tokens="patch", normalized=False, image_size=32, resize="shortest",
        crop="center", interpolation="bicubic", mean=(0.0,) * 3, std=(1.0,) * 3,
        precision="fp32", batch_size=4, dtype="float16", patches=PATCHES, width=WIDTH,
        preprocess_version=1,
    )  # fmt: skip
    root.mkdir(parents=True)
    write_text(root / "spec.json", spec.to_json().decode())
    rng = np.random.default_rng(seed)
    all_ids = np.array(image_ids, dtype=np.int64)
    features = rng.standard_normal((len(all_ids), PATCHES, WIDTH)).astype(np.float16)
    half = (len(all_ids) + 1) // 2
    files, numbers = [], []
    for part in sorted(
        (slice(start, start + half) for start in range(0, len(all_ids), half)),
        key=lambda p: hashlib.sha256(all_ids[p].tobytes()).hexdigest(),
    ):
        path = root / f"{hashlib.sha256(all_ids[part].tobytes()).hexdigest()[:16]}.h5"
        write_shard(path, spec, all_ids[part], features[part])
        files.append(ShardFile(path.name, path.stat().st_size, sha256_of(path)))
        numbers.append((part, len(files) - 1))
    shard_number = np.zeros(len(all_ids), np.int32)
    row = np.zeros(len(all_ids), np.int32)
    for part, number in numbers:
        shard_number[part] = number
        row[part] = np.arange(len(all_ids[part]))
    StoreIndex(
        spec.fingerprint, tuple(files), all_ids, shard_number, row,
        hash_rows(features), np.arange(len(all_ids), dtype=np.uint64),
    ).write(root / "index.parquet")  # fmt: skip


@pytest.fixture
def make_store(tmp_path):
    """Build a store of other images."""

    def make(image_ids):
        root = tmp_path / f"store of {len(list(tmp_path.iterdir()))}"
        write_store(root, image_ids)
        return FeatureStore(root)

    return make


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("store") / "features"
    write_store(root)
    return FeatureStore(root)


@pytest.fixture(scope="session")
def make_model(phi_dir):
    """Build a fresh CaptionModel; with `lora`, its second LoRA matrix is not zero."""
    import torch

    from train.model.captioner import CaptionModel
    from train.model.language_model import add_lora, load_language_model
    from train.model.projector import seeded_projector
    from train.settings import LlmSettings, LoraSettings

    def make(kind="mlp", *, quantize="none", dtype="fp32", lora=None, seed=0):
        settings = LlmSettings(model=str(phi_dir), quantize=quantize, dtype=dtype)
        language_model = load_language_model(settings, torch.device("cpu"))
        if lora is not None:
            add_lora(language_model, LoraSettings(r=4, alpha=8, dropout=lora), seed)
            generator = torch.Generator().manual_seed(seed)
            for name, parameter in language_model.named_parameters():
                if "lora_B" in name:
                    parameter.data.normal_(std=0.1, generator=generator)
        return CaptionModel(seeded_projector(kind, WIDTH, HIDDEN, seed), language_model)

    return make


LOOP = {
    "epochs": 1,
    "learning_rate": 1.0e-2,
    "weight_decay": 0.0,
    "warmup_share": 0.1,
    "clip_norm": 1.0,
    "texts_per_image": 5,
    "micro_batch_tokens": 128,
    "row_tokens": 64,
    "max_text_tokens": 64,
    "log_every_steps": 1,
    "order": "global",
    "window_shards": 2,
    "validate_every_steps": 4,
    "validation_images": 3,
    "samples": 1,
}


@pytest.fixture
def loop_values():
    return dict(LOOP)


@dataclass
class Workspace:
    """A working directory as the stages before training leave it."""

    root: Path
    phi_dir: Path

    def write(self, name, text):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def write_index(self, captions, conversations):
        """Write captions (image, split, text) and conversations (image, split, turns)."""
        folder = self.root / "data/index"
        folder.mkdir(parents=True, exist_ok=True)
        rows = [
            {"caption_id": n, "image_id": i, "split": s, "caption": c}
            for n, (i, s, c) in enumerate(captions)
        ]
        schema = pa.schema(
            [("caption_id", pa.int64()), ("image_id", pa.int64())]
            + [(name, pa.string()) for name in ("split", "caption")]
        )
        pq.write_table(pa.Table.from_pylist(rows, schema), folder / "captions.parquet")
        turn = pa.struct([("role", pa.string()), ("text", pa.string())])
        schema = pa.schema(
            [
                ("conversation_id", pa.string()),
                ("image_id", pa.int64()),
                ("split", pa.string()),
                ("turns", pa.list_(turn)),
            ]
        )
        rows = [
            {
                "conversation_id": str(n),
                "image_id": i,
                "split": s,
                "turns": [
                    {"role": role, "text": text}
                    for pair in pairs
                    for role, text in zip(("user", "assistant"), pair, strict=True)
                ],
            }
            for n, (i, s, pairs) in enumerate(conversations)
        ]
        pq.write_table(pa.Table.from_pylist(rows, schema), folder / "conversations.parquet")

    def write_stage_1(self, seed=3, **changes):
        """Leave what stage 2 reads of stage 1: a projector, and from what it was made."""
        from train.model.fingerprint import language_model_identity
        from train.model.language_model import load_tokenizer
        from train.model.projector import seeded_projector
        from train.settings import LlmSettings

        llm = LlmSettings(model=str(self.phi_dir), quantize="none", dtype="fp32")
        made_from = {
            "features_fingerprint": FeatureStore(self.root / "data/features").fingerprint,
            "language_model": language_model_identity(llm, load_tokenizer(llm)),
        }
        seeded_projector("mlp", WIDTH, HIDDEN, seed).save(
            self.root / "runs/pretrain/projector.safetensors"
        )
        self.write("runs/pretrain/provenance.json", json.dumps(made_from | changes))

    def params(self, **sections):
        values = {
            "seed": 0,
            "llm": {"model": str(self.phi_dir), "quantize": "none", "dtype": "fp32"},
            "projector": {"kind": "mlp"},
            "pretrain": {**LOOP, "batch_captions": 8},
            "finetune": {
                **LOOP,
                "projector_learning_rate": 1e-3,
                "batch_examples": 4,
                "lora": {"r": 4, "alpha": 8, "dropout": 0.05},
            },
            "checkpoints": {"every_steps": 1, "every_minutes": 60.0, "keep": 2},
            "tracking": {"wandb": "disabled"},
        }
        for name, changes in sections.items():
            values[name] = (
                {**values.get(name, {}), **changes} if isinstance(changes, dict) else changes
            )
        # JSON is YAML, but for these two numbers.
        text = json.dumps(values, indent=1).replace("NaN", ".nan").replace("Infinity", ".inf")
        self.write("params.yaml", text)
        return Params.read(Path("params.yaml"))

    def json(self, name):
        return json.loads((self.root / name).read_text())

    def history(self, stage):
        with (self.root / "runs" / stage / "history.csv").open() as file:
            return list(csv.DictReader(file))


TRAIN, VAL, HOLDOUT = IMAGE_IDS[:12], IMAGE_IDS[12:16], IMAGE_IDS[16:20]


@pytest.fixture
def workspace(tmp_path, monkeypatch, phi_dir):
    """Features, index and settings: images 100-111 to train, 112-115 val, 116-119 holdout."""
    monkeypatch.chdir(tmp_path)
    made = Workspace(tmp_path, phi_dir)
    write_store(tmp_path / "data/features")
    captions = [
        (i, split, f"a {color} {animal} in the box")
        for split, ids in (("train", TRAIN + HOLDOUT), ("val", VAL))
        for i in ids
        for color, animal in (("red", "cat"), ("blue", "dog"))
    ]
    conversations = [
        (i, split, [("What is on the box", "a red cat"), ("how many", "the dog")])
        for split, ids in (("train", TRAIN), ("holdout", HOLDOUT))
        for i in ids
    ]
    made.write_index(captions, conversations)
    made.params()
    return made


# Not of the session: while Playwright runs, no other test can start an event loop.
@pytest.fixture(scope="module")
def browser():
    """The Chromium of the system, for `tests.browser.visited`."""
    from tests.browser import chromium

    with chromium() as started:
        yield started
