"""Builds the served page with Gradio: its components, and the handlers of their events."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from eval.chat.conversation import ChatHandlers

MAX_TOKENS = 256
"""Upper end of the slider for the answer's length, unless the run's own limit is higher."""
MAX_QUESTION = 2000
"""Characters."""


def build_page(handlers: ChatHandlers, examples: Sequence[Path]) -> gr.Blocks:
    """Build the page: the picture on the left, the conversation on the right.

    Args:
        handlers: Answer the page's events.
        examples: Picture files to choose from.
    """
    answers, model = handlers.trained.answers, f"the model in `{handlers.trained.folder}`"
    task = f"and ask {model} about it" if answers else f"and {model} writes a caption"
    with gr.Blocks(title="patchcache", analytics_enabled=False) as page:
        gr.Markdown(f"# patchcache\nChoose a picture, {task}.")
        conversation = gr.State(None)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
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
            with gr.Column(scale=3, min_width=320):
                chat = gr.Chatbot(
                    label="Conversation",
                    height=380,
                    render_markdown=False,
                    latex_delimiters=[],
                    buttons=[],
                    feedback_options=None,
                    placeholder="Questions and answers appear here.",
                )
                question = gr.Textbox(
                    label="Question",
                    placeholder="Leave it empty for a caption",
                    max_lines=4,
                    max_length=MAX_QUESTION,
                    visible=answers,
                )
                ask = gr.Button("Ask" if answers else "Caption", variant="primary")
                temperature, length = _add_sliders(handlers)

        # One concurrency id for all events: the model serves one visitor at a time.
        options: dict[str, Any] = {
            "concurrency_limit": 1,
            "concurrency_id": "model",
            "api_visibility": "private",
        }
        # Without preprocess: Gradio would open the file before the pipeline's decoder checks it.
        picture.change(
            handlers.choose_picture,
            picture,
            [picture, conversation, chat],
            preprocess=False,
            show_progress="hidden",
            **options,
        )
        chat.clear(handlers.clear, conversation, conversation, **options)
        gr.on(
            [ask.click, question.submit],
            handlers.reply,
            [question, conversation, temperature, length],
            [chat, question, conversation],
            show_progress="hidden",
            **options,
        )
    return page


def _add_sliders(handlers: ChatHandlers) -> tuple[gr.Slider, gr.Slider]:
    """Add the sliders of temperature and answer length to the page."""
    settings = handlers.settings
    limit = settings.answer_tokens if handlers.trained.answers else settings.caption_tokens
    with gr.Accordion("More settings", open=False):
        temperature = gr.Slider(
            0, 2, 0, step=0.05, label="Temperature", info="0: always the likeliest token"
        )
        length = gr.Slider(
            1, max(MAX_TOKENS, limit), limit, step=1, label="Longest answer, in tokens"
        )
    return temperature, length
