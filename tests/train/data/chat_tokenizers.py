"""Tokenizers in the ways of well-known chat models, with templates written after theirs."""

import functools
import json

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

WORDS = """What is in the box? A red cat. Answer: 12 dogs, 3.5 birds and "one" [INST] user assistant
system Question: yes no how many of them are (a) two (b) three? <|user|> <|assistant|> </s> ### - *
Instruct: Output: It's on the table. User Round 1 2 3: You are a helpful assistant. Today Date: Jul
?\n .\n !\n :\n )\n "\n >\n *\n"""

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3, Qwen and OLMo 2 split a text: punctuation takes the line breaks behind it."""

CHATML = """\
{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.\
<|im_end|>\n' }}{% endif %}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' \
+ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}\
{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA_3 = """\
{{- bos_token }}{%- set today = strftime_now("%d %b %Y") %}{{- "<|start_header_id|>system\
<|end_header_id|>\n\nToday Date: " + today + "\n\n<|eot_id|>" }}{%- for message in messages %}\
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim \
+ '<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant\
<|end_header_id|>\n\n' }}{%- endif %}"""

GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not \
supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != \
(loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}\
{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = \
message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + \
'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}\
{% endif %}"""

ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

MISTRAL = """\
{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 \
== 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}\
{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}\
{{ ' ' + message['content'] + eos_token}}{% endif %}{% endfor %}"""

LLAMA_2 = """\
{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + \
message['content'].strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' '  + \
message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""

QWEN_3 = """\
{%- set ns = namespace(searching=true, last_query_index=messages|length - 1) %}{%- for message in \
messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}{%- if ns.searching and \
message.role == "user" %}{%- set ns.searching = false %}{%- set ns.last_query_index = index %}\
{%- endif %}{%- endfor %}{%- for message in messages %}{%- set content = message.content %}{%- if message.role \
== "user" %}{{- '<|im_start|>user\n' + content + '<|im_end|>\n' }}{%- else %}{%- if loop.index0 > \
ns.last_query_index %}{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + content }}{%- else %}\
{{- '<|im_start|>assistant\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endif %}\
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

OLMO_2 = """\
{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|user|>\n' + \
message['content'] + '\n' }}{% elif message['role'] == 'assistant' %}{% if not loop.last %}\
{{ '<|assistant|>\n'  + message['content'] + eos_token + '\n' }}{% else %}{{ '<|assistant|>\n'  + \
message['content'] + eos_token }}{% endif %}{% endif %}{% endfor %}"""

PHI_3 = """\
{% for message in messages %}{{'<|' + message['role'] + '|>\n' + message['content'] + \
'<|end|>\n'}}{% endfor %}"""

GLM_4 = """\
[gMASK]<sop>{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] \
}}{% endfor %}"""


def fast(backend, template, **special):
    """Return a tokenizer of transformers with a chat template."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = template
    return tokenizer


@functools.cache
def _byte_level_text(add_prefix_space=False):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CL100K), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([WORDS] * 5, trainer)
    return tokenizer.to_str()


def byte_level(template, special=(), plain=(), bos=None, eos="<|endoftext|>"):
    """Return byte-level BPE in the way of Qwen and Llama 3.

    Args:
        template: Chat template, or None.
        special: Special tokens.
        plain: Added tokens that are not special.
        bos: Put before every text, unless None.
        eos: End of a text.
    """
    tokenizer = Tokenizer.from_str(_byte_level_text())
    tokenizer.add_special_tokens([*([bos] if bos else []), eos, *special])
    tokenizer.add_tokens(list(plain))
    if bos:
        _put_first(tokenizer, bos)
    return fast(tokenizer, template, eos_token=eos, **({"bos_token": bos} if bos else {}))


@functools.cache
def _sentence_piece_text():
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS.splitlines() * 5, trainer)
    state = json.loads(tokenizer.to_str())
    # Only the trainer calls bytes special.
    state["added_tokens"] = state["added_tokens"][:3]
    return json.dumps(state)


def sentence_piece(template, special=(), plain=(), scheme="first", eos="</s>"):
    """Return BPE over words with a mark at their start, in the way of Llama 2 and Mistral.

    Args:
        template: Chat template, or None.
        special: Special tokens.
        plain: Added tokens that are not special.
        scheme: Which texts get a mark before their first word: the "first" text, "always" every
            text behind a special token too, or "never".
        eos: End of a text.
    """
    tokenizer = Tokenizer.from_str(_sentence_piece_text())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([] if scheme == "never" else [decoders.Strip(" ", 1, 0)]),
        ]
    )
    tokenizer.add_special_tokens([*special, eos])
    tokenizer.add_tokens(list(plain))
    _put_first(tokenizer, "<s>")
    return fast(tokenizer, template, bos_token="<s>", eos_token=eos, unk_token="<unk>")


def _put_first(tokenizer, token):
    token_id = tokenizer.token_to_id(token)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, token_id)]
    )


def phi_3_tokens():
    return [AddedToken(f"<|{name}|>", rstrip=True, special=True) for name in ("user", "assistant")]


IM = ("<|im_start|>", "<|im_end|>")
MAKERS = {
    "Qwen 2.5, SmolLM 2": lambda: byte_level(CHATML, IM, eos="<|im_end|>"),
    "ChatML with another EOS": lambda: byte_level(CHATML, IM),
    "ChatML whose tokens are not special": lambda: byte_level(CHATML, plain=IM),
    "Qwen 3": lambda: byte_level(QWEN_3, IM, ("<think>", "</think>")),
    "Llama 3": lambda: byte_level(
        LLAMA_3,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>",
    ),
    "OLMo 2": lambda: byte_level(OLMO_2, bos="<|endoftext|>"),
    "Gemma": lambda: sentence_piece(
        GEMMA, ("<start_of_turn>", "<end_of_turn>"), plain=("\n",), scheme="never", eos="<eos>"
    ),
    "Zephyr": lambda: sentence_piece(ZEPHYR),
    "TinyLlama, the old way of SentencePiece": lambda: sentence_piece(ZEPHYR, scheme="always"),
    "Mistral 0.2": lambda: sentence_piece(MISTRAL),
    "Mistral 0.3": lambda: sentence_piece(MISTRAL, ("[INST]", "[/INST]")),
    "Mistral 0.3, no spaces": lambda: sentence_piece(
        MISTRAL.replace("[INST] ", "[INST]").replace("' ' +", ""), ("[INST]", "[/INST]")
    ),
    "Llama 2": lambda: sentence_piece(LLAMA_2, scheme="always"),
    "Phi 3": lambda: sentence_piece(PHI_3, (*phi_3_tokens(), "<|end|>"), scheme="always"),
    "GLM 4": lambda: byte_level(GLM_4, ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>")),
}  # fmt: skip
"""Kind of chat model to a function that makes its tokenizer."""


@functools.cache
def chat_tokenizer(name):
    return MAKERS[name]()
