"""Writes a model directory in the layout of microsoft/phi-2, with random weights.

    python -m bench.make_phi2 DIR

Same config, tensors, types, shards and number of tokens as the hub's, made without a network:
5.6 GB in about a minute. What it says is noise; what it costs is what Phi-2 costs.

The tokenizer is byte-level BPE, learnt from the whole words among CLIP's tokens, each as often as
its rank gives by Zipf's law: a common English word is one token, with the space before it, as in
Phi-2's. Captions take 1.2 to 1.3 tokens a word in both.
"""

import gzip
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from open_clip.tokenizer import default_bpe
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import CodeGenTokenizer, PhiConfig, PhiForCausalLM

from cache.cli.command import command_parser, run_guarded
from cache.files.atomic import write_json
from workspace.errors import StageError

Shapes = dict[str, tuple[int, ...]]

PHI2: dict[str, Any] = {
    "architectures": ["PhiForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 50256,
    "embd_pdrop": 0.0,
    "eos_token_id": 50256,
    "hidden_act": "gelu_new",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 10240,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "phi",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "partial_rotary_factor": 0.4,
    "qk_layernorm": False,
    "resid_pdrop": 0.1,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 51200,
}
"""The values of config.json.

Source: huggingface.co/microsoft/phi-2, config.json.
"""

SHARD_BYTES = 5 * 10**9
"""Most bytes of tensors in a file; so Phi-2's are two."""

BASE_TOKENS = 50256
"""Tokens of GPT-2 before the end of text: 256 bytes and 50,000 merges."""

CLIP_TOKENS = 48895
"""Lines of CLIP's list of merges that its own tokenizer uses, the header counted."""

BLANKS = [" " * length for length in range(31, 1, -1)] + ["\t" * n for n in range(9, 1, -1)]
"""Runs of blanks that CodeGen's tokenizer, which Phi-2 took, has beyond GPT-2's: 38 tokens."""


def write_phi(folder: Path, config: dict[str, Any], shard_bytes: int, seed: int) -> None:
    """Write a whole model directory; no more than one tensor is in memory at a time.

    Args:
        folder: Made if missing; files of the same names are replaced. The index comes last.
        config: As `PHI2`.
        shard_bytes: Most bytes of tensors in a file.
        seed: Of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    ends = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
    write_json(folder / "generation_config.json", {"_from_model_config": True} | ends)
    write_tokenizer(folder)
    shards = split(tensor_shapes(config), shard_bytes)
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_shard(folder / name, shapes, config["initializer_range"], generator)
        weight_map |= dict.fromkeys(shapes, name)
    total = sum(num_bytes(shape) for shapes in shards for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def tensor_shapes(config: dict[str, Any]) -> Shapes:
    """Return the shape of every tensor of the model: embeddings, layers in order, head."""
    with torch.device("meta"):
        model = PhiForCausalLM(PhiConfig(**config))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def num_bytes(shape: tuple[int, ...]) -> int:
    """Return the size of a float16 tensor."""
    return 2 * math.prod(shape)


def split(shapes: Shapes, shard_bytes: int) -> list[Shapes]:
    """Cut the tensors into files, each filled up as far as it may."""
    shards: list[Shapes] = [{}]
    size = 0
    for name, shape in shapes.items():
        if shards[-1] and size + num_bytes(shape) > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += num_bytes(shape)
    return shards


def write_shard(path: Path, shapes: Shapes, std: float, generator: torch.Generator) -> None:
    """Write a safetensors file tensor by tensor; the library wants all of them in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + num_bytes(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tqdm(shapes.items(), desc=path.name, unit="tensor", disable=None):
            # A scale around 1 where a layer's norm multiplies; noise around 0 everywhere else.
            mean = 1.0 if name.endswith("layernorm.weight") else 0.0
            values = torch.empty(shape).normal_(mean, std, generator=generator)
            file.write(values.half().numpy().data)


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of 50,295 entries whose end of text is also its beginning and unknown."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=BASE_TOKENS,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_text(), trainer)
    bpe.model.save(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    if len(vocabulary) != BASE_TOKENS:
        raise StageError(
            f"{default_bpe()}: {len(vocabulary)} tokens were learnt from its words, wanted "
            f"{BASE_TOKENS}. Install the open_clip of requirements.lock."
        )
    pairs = [tuple(line.split(" ")) for line in merges if not line.startswith("#version")]
    tokenizer = CodeGenTokenizer(vocab=vocabulary, merges=pairs, model_max_length=2048)
    tokenizer.add_tokens([AddedToken(blank, normalized=True) for blank in BLANKS])
    tokenizer.save_pretrained(folder)


def _text() -> Iterator[str]:
    """Yield every whole word among CLIP's tokens as often as English would have it."""
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        tokens = ["".join(line.split()) for line in file][1:CLIP_TOKENS]
    words = [token.removesuffix("</w>") for token in tokens if token.endswith("</w>")]
    words = [word for word in words if word.isascii() and word.isalpha()]
    for rank, word in enumerate(words, start=1):
        times = max(4, len(words) // rank)
        yield f" {word}" * times + f" {word.capitalize()}" * (times // 4)
        yield f"\n{word}" * (times // 8) + f"\n{word.capitalize()}" * (times // 8)


def main() -> None:
    """Read the command line and write the directory."""
    parser = command_parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    folder = parser.parse_args().folder
    run_guarded(lambda: write_phi(folder, PHI2, SHARD_BYTES, seed=0))


if __name__ == "__main__":
    main()
