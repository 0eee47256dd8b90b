"""Writes a prompt format as a chat template of transformers, for an exported model."""

import json

from train.data.prompts import PromptFormat

TEMPLATE = """\
{{- lead -}}
{%- for message in messages -%}
    {%- if message['content'] is not string -%}
        {%- for part in message['content'] if part['type'] == 'image' -%}
            {{- image -}}
        {%- endfor -%}
    {%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- set content = message['content'] -%}
    {%- if content is not string -%}
        {%- set content = content | selectattr('type', 'equalto', 'text') \
| map(attribute='text') | join('\\n') -%}
    {%- endif -%}
    {%- set content = content | trim if strips else content -%}
    {%- if message['role'] == 'user' -%}
        {{- (first_question if loop.first else later_question) + content + ask -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- answer + content + closing -}}
    {%- else -%}
        {{- raise_exception('a message has the role user or assistant, found ' + message['role']) -}}
    {%- endif -%}
{%- endfor -%}
"""
"""The template behind the lines that set the constant texts."""


def jinja_template(prompt_format: PromptFormat, image_token: str) -> str:
    """Return a prompt format as a chat template.

    Its rendering of messages, tokenised without further special tokens, is the lead, the image
    token of each picture, and the tokens of `PromptFormat.dialogue_prompt`. Two limits: a special
    token spelled out in a message is a token, and a tokenizer that marks the text behind every
    special token as the start of a word (SentencePiece's old way) does so behind the image token.

    Args:
        prompt_format: The format.
        image_token: The text that stands for a picture; a special token of the tokenizer.
    """
    constants = vars(prompt_format.wording) | {
        "image": image_token,
        "strips": prompt_format.strips,
    }
    # Jinja's literals of texts and truth values are those of JSON.
    lines = [
        f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} -%}}\n"
        for name, value in constants.items()
    ]
    return "".join(lines) + TEMPLATE
