"""Builds the served page: what is on it, and what happens when a visitor does something."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from eval.chat.conversation import Host

MAX_TOKENS = 256
"""Longest answer that can be chosen."""
MAX_QUESTION = 2000
"""Characters."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What of the page is read and written while a visitor is there."""

    conversation: gr.State
    picture: gr.Image
    chat: gr.Chatbot
    question: gr.Textbox
    ask: gr.Button
    temperature: gr.Slider
    length: gr.Slider


def build_page(host: Host, examples: Sequence[Path]) -> gr.Blocks:
    """Build the page: what is on it, and what happens there."""
    with gr.Blocks(title="patchcache", analytics_enabled=False) as page:
        connect(host, lay_out(host, examples))
    return page


def lay_out(host: Host, examples: Sequence[Path]) -> Parts:
    """Put the picture on the left, and what is said on the right."""
    answers = host.trained.answers
    folder = f"`{host.trained.folder}`"
    what = f"and ask: {folder} looks at it, and answers" if answers else f"for {folder} to caption"
    gr.Markdown(f"# patchcache\nChoose a picture {what}.")
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            picture = _picture(examples)
        with gr.Column(scale=3, min_width=320):
            chat = gr.Chatbot(
                label="Conversation",
                height=380,
                render_markdown=False,
                latex_delimiters=[],
                buttons=[],
                feedback_options=None,
                placeholder="What is said about the picture comes here.",
            )
            question = gr.Textbox(
                label="Question",
                placeholder="Leave it empty for a caption",
                max_lines=4,
                max_length=MAX_QUESTION,
                visible=answers,
            )
            ask = gr.Button("Ask" if answers else "Caption", variant="primary")
            temperature, length = _sliders(host)
    return Parts(
        conversation=gr.State(None),
        picture=picture,
        chat=chat,
        question=question,
        ask=ask,
        temperature=temperature,
        length=length,
    )


def _picture(examples: Sequence[Path]) -> gr.Image:
    picture = gr.Image(
        label="Picture",
        sources=["upload", "clipboard"],
        image_mode=None,
        type="filepath",
        buttons=[],
        height=360,
    )
    if examples:
        gr.Examples([[str(path)] for path in examples], picture, label="Examples")
    return picture


def _sliders(host: Host) -> tuple[gr.Slider, gr.Slider]:
    """Return those of the temperature and of the longest answer."""
    settings = host.settings
    most = settings.answer_tokens if host.trained.answers else settings.caption_tokens
    with gr.Accordion("More", open=False):
        temperature = gr.Slider(
            0, 2, 0, step=0.05, label="Temperature", info="0: always the likeliest word"
        )
        length = gr.Slider(
            1, max(MAX_TOKENS, most), most, step=1, label="Longest answer, in tokens"
        )
    return temperature, length


def connect(host: Host, parts: Parts) -> None:
    """Say what happens when a picture is chosen, a conversation cleared, a question asked."""
    # One name for all: the model answers one visitor at a time.
    at_a_time: dict[str, Any] = {
        "concurrency_limit": 1,
        "concurrency_id": "model",
        "api_visibility": "private",
    }
    # The file itself: Gradio's own reader would open the picture before the pipeline's does.
    parts.picture.change(
        host.begin,
        parts.picture,
        [parts.picture, parts.conversation, parts.chat],
        preprocess=False,
        show_progress="hidden",
        **at_a_time,
    )
    parts.chat.clear(host.forget, parts.conversation, parts.conversation, **at_a_time)
    gr.on(
        [parts.ask.click, parts.question.submit],
        host.reply,
        [parts.question, parts.conversation, parts.temperature, parts.length],
        [parts.chat, parts.question, parts.conversation],
        show_progress="hidden",
        **at_a_time,
    )
