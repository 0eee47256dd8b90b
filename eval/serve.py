"""Command: serves a page on which a finished run is asked about pictures, to this machine alone.

    python -m eval.serve --run runs/finetune [--port 7860] [--share]

A conversation is about one picture, and a new picture begins a new one. A run of stage 1 only
captions. The page fetches nothing from any network; only --share opens it to others.
"""

import argparse
import html
import os
import secrets
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from numpy.typing import NDArray

from cache.command import run_guarded
from cache.errors import CacheError, StageError
from eval.ask import answer, make_sampling
from eval.settings import EvaluateSettings
from eval.showcase import validation_pictures
from eval.trained import Trained, load_run
from eval.vision import Vision, read_picture

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

Message = dict[str, str]


@dataclass(frozen=True)
class Conversation:
    """A picture, and what was said about it."""

    patches_PD: NDArray[np.float16]
    """Features of the picture."""
    turns: tuple[tuple[str, str], ...] = ()
    """Questions and answers; the question is empty where a caption was made without any."""

    def then(self, question: str, answer: str) -> "Conversation":
        """Return the conversation with one turn more."""
        return replace(self, turns=(*self.turns, (question, answer)))

    def messages(self) -> list[Message]:
        """Return it as the page shows it."""
        said = [
            {"role": role, "content": text}
            for turn in self.turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        return [message for message in said if message["content"]]


class Host:
    """Answers what visitors ask, one after the other; each conversation is handed in and out."""

    def __init__(self, trained: Trained, vision: Vision) -> None:
        self.trained = trained
        self.settings = trained.params.section("evaluate", EvaluateSettings)
        self._vision = vision
        self._closed = threading.Event()

    def close(self) -> None:
        """End the answer that is being made."""
        self._closed.set()

    def begin(
        self, upload: dict[str, Any] | None
    ) -> tuple[Any, Conversation | None, list[Message]]:
        """Begin a conversation about a picture.

        Args:
            upload: What Gradio knows of the file: its `path` is below the uploads.

        Returns:
            What becomes of the picture, the conversation, and its messages. A picture that cannot
            be read goes, and the page says why.
        """
        if upload is None:
            return gr.skip(), None, []
        path = Path(upload["path"])
        try:
            conversation = Conversation(self._vision.look(read_picture(path), path.name))
        except CacheError as error:
            # Not an error of Gradio's, behind which the conversation before would go on.
            gr.Warning(html.escape(str(error)), duration=None)
            return None, None, []
        # Given back, it would count as another picture.
        return gr.skip(), conversation, []

    def forget(self, conversation: Conversation | None) -> Conversation | None:
        """Begin again with the same picture."""
        return replace(conversation, turns=()) if conversation else None

    def reply(
        self,
        question: str | None,
        conversation: Conversation | None,
        temperature: float,
        max_tokens: int,
    ) -> Iterator[tuple[list[Message], str, Conversation]]:
        """Answer while the page looks on.

        Args:
            question: None or empty for a caption; None comes from a box that is not shown.
            conversation: So far.
            temperature: 0 takes the likeliest token.
            max_tokens: Most tokens of the answer.

        Yields:
            The messages, what is left in the question's box, and the conversation, which has the
            new turn when it is finished.
        """
        if conversation is None:
            raise gr.Error("Choose a picture first.", print_exception=False)
        question = (question or "").strip()
        if self.trained.answers:
            question = question or self.settings.caption_question
        text = ""
        try:
            for piece in self._pieces(question, conversation, temperature, int(max_tokens)):
                text += piece
                yield conversation.then(question, text).messages(), "", conversation
        except CacheError as error:
            raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from None
        conversation = conversation.then(question, text)
        yield conversation.messages(), "", conversation

    def _pieces(
        self, question: str, conversation: Conversation, temperature: float, max_tokens: int
    ) -> Iterator[str]:
        sampling = make_sampling(temperature, secrets.randbits(32)) if temperature else None
        pieces = answer(
            self.trained,
            conversation.patches_PD,
            question,
            turns=conversation.turns,
            max_tokens=max_tokens,
            sampling=sampling,
        )
        # The question is shown before the model has read it.
        yield ""
        with closing(pieces):
            for piece in pieces:
                if self._closed.is_set():
                    return
                yield piece


def build_page(host: Host, examples: Sequence[Path]) -> gr.Blocks:
    """Lay out the page: the picture on the left, what is said on the right."""
    answers = host.trained.answers
    folder = f"`{host.trained.folder}`"
    what = f"and ask: {folder} looks at it, and answers" if answers else f"for {folder} to caption"
    with gr.Blocks(title="patchcache", analytics_enabled=False) as page:
        gr.Markdown(f"# patchcache\nChoose a picture {what}.")
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
                with gr.Accordion("More", open=False):
                    temperature = gr.Slider(
                        0, 2, 0, step=0.05, label="Temperature", info="0: always the likeliest word"
                    )
                    settings = host.settings
                    most = settings.answer_tokens if answers else settings.caption_tokens
                    length = gr.Slider(
                        1, max(MAX_TOKENS, most), most, step=1, label="Longest answer, in tokens"
                    )
        # One name for all: the model answers one visitor at a time.
        at_a_time: dict[str, Any] = {
            "concurrency_limit": 1,
            "concurrency_id": "model",
            "api_visibility": "private",
        }
        # The file itself: Gradio's own reader would open the picture before the pipeline's does.
        picture.change(
            host.begin,
            picture,
            [picture, conversation, chat],
            preprocess=False,
            show_progress="hidden",
            **at_a_time,
        )
        chat.clear(host.forget, conversation, conversation, **at_a_time)
        gr.on(
            [ask.click, question.submit],
            host.reply,
            [question, conversation, temperature, length],
            [chat, question, conversation],
            show_progress="hidden",
            **at_a_time,
        )
    return page


def serve(arguments: argparse.Namespace) -> None:
    """Serve the page until it is interrupted."""
    trained = load_run(arguments.run)
    vision = Vision(trained)
    # Another tower than the run's is found now, and not by the first visitor.
    vision.load()
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of a run: runs/finetune")
    parser.add_argument("--port", type=_port, default=7860, help="default: %(default)s")
    parser.add_argument("--share", action="store_true", help="open it to others, by a public link")
    arguments = parser.parse_args()
    run_guarded(lambda: serve(arguments))


if __name__ == "__main__":
    main()
