"""Command: serves a page on which a finished run is asked about pictures, to this machine alone.

    python -m eval.serve --run runs/finetune [--port 7860] [--share]

A conversation is about one picture, and a new picture begins a new one. A run of stage 1 only
captions. The page fetches nothing from any network; only --share opens it to others.
"""

import argparse
import os
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from cache.command import command_parser, run_guarded
from cache.errors import StageError
from eval.conversation import Host
from eval.showcase import validation_pictures
from eval.trained import load_run, open_run
from eval.vision import Vision

HOST = "127.0.0.1"
MAX_UPLOAD = "10mb"
MAX_TOKENS = 256
"""Longest answer that can be chosen."""
MAX_QUESTION = 2000
"""Characters."""
EXAMPLES = 5
VISITORS = 100
"""So many conversations are remembered."""

CSS = "footer {display: none !important}"


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


def serve(arguments: argparse.Namespace) -> None:
    """Serve the page until it is interrupted."""
    run = open_run(arguments.run)
    vision = Vision(run)
    # Another tower than the run's is found now, and not by the first visitor.
    vision.load()
    trained = load_run(arguments.run, run)
    host = Host(trained, vision)
    with tempfile.TemporaryDirectory(prefix="patchcache-") as folder:
        keep_to_itself(Path(folder) / "uploads")
        examples = validation_pictures(trained.params, Path(folder), EXAMPLES)
        page = build_page(host, examples)
        try:
            print(f"serve: {launch(page, arguments.port, arguments.share)}", flush=True)
            threading.Event().wait()
        finally:
            host.close()
            page.close(verbose=False)


def keep_to_itself(uploads: Path) -> None:
    """Tell Gradio to call nobody, to keep uploads here, and to ask itself without a proxy."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(uploads)}
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), HOST]))


def launch(page: gr.Blocks, port: int, share: bool) -> str:
    """Start the server, and return the page's address.

    Raises:
        StageError: The port is taken.
    """
    page.queue(api_open=False)
    try:
        _, address, _ = page.launch(
            server_name=HOST,
            server_port=port,
            share=share,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=MAX_UPLOAD,
            state_session_capacity=VISITORS,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            css=CSS,
        )
    except OSError as error:
        raise StageError(
            f"cannot serve at {HOST}:{port}: {error}. Name another one: --port."
        ) from None
    return str(address)


def _port(text: str) -> int:
    if not 1 <= int(text) <= 65535:
        raise ValueError
    return int(text)


def main() -> None:
    """Read the command line and serve."""
    parser = command_parser(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of a run: runs/finetune")
    parser.add_argument("--port", type=_port, default=7860, help="default: %(default)s")
    parser.add_argument("--share", action="store_true", help="open it to others, by a public link")
    arguments = parser.parse_args()
    run_guarded(lambda: serve(arguments))


if __name__ == "__main__":
    main()
