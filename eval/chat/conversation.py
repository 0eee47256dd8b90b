"""The event handlers of the served page: choose a picture, ask, clear.

Gradio keeps each visitor's conversation and hands it in and out; nothing is kept here.

Letters: P patches, D width of the vision tower.
"""

import html
import secrets
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr
import numpy as np
from numpy.typing import NDArray

from cache.errors import PatchcacheError
from eval.chat.answering import make_sampling, stream_answer
from eval.chat.encoder import RunEncoder
from eval.runs import LoadedRun
from eval.server.pictures import PagePictures
from eval.server.sessions import visitor_of_session
from eval.settings import EvaluateSettings

Message = dict[str, str]


@dataclass(frozen=True)
class Conversation:
    """A picture's features, and the questions and answers about it."""

    patches_PD: NDArray[np.float16]
    turns: tuple[tuple[str, str], ...] = ()
    """Questions and answers; the question is empty for a caption of a run that only captions."""

    def with_turn(self, question: str, answer: str) -> "Conversation":
        """Return the conversation with another turn at the end."""
        return replace(self, turns=(*self.turns, (question, answer)))

    def messages(self) -> list[Message]:
        """Return the conversation in the format of `gr.Chatbot`."""
        return [
            {"role": role, "content": text}
            for turn in self.turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
            if text
        ]


class ChatHandlers:
    """The handlers of the page's events. Gradio calls one at a time."""

    def __init__(self, trained: LoadedRun, encoder: RunEncoder, pictures: PagePictures) -> None:
        self.trained = trained
        self.settings = trained.params.section("evaluate", EvaluateSettings)
        self._encoder = encoder
        self._pictures = pictures
        self._closed = threading.Event()

    def close(self) -> None:
        """Stop the answer that is being generated."""
        self._closed.set()

    def choose_picture(
        self, upload: dict[str, Any] | None, request: gr.Request
    ) -> tuple[Any, Conversation | None, list[Message]]:
        """Start a conversation about a picture.

        Args:
            upload: The visitor's file; only a `path` that was handed out to the visitor is valid.
            request: Names the visitor's session.

        Returns:
            An update of the picture, the conversation, and its messages. A picture that cannot be
            read is removed from the page, with a warning.
        """
        if upload is None:
            return gr.skip(), None, []
        try:
            visitor = visitor_of_session(request.session_hash)
            name, data = self._pictures.read(upload["path"], visitor)
            conversation = Conversation(self._encoder.encode(data, name))
        except PatchcacheError as error:
            # A gr.Error would leave the earlier conversation in place.
            gr.Warning(html.escape(str(error)), duration=None)
            return None, None, []
        # Returning the picture would trigger its change event again.
        return gr.skip(), conversation, []

    def clear(self, conversation: Conversation | None) -> Conversation | None:
        """Start again with the same picture."""
        return replace(conversation, turns=()) if conversation else None

    def reply(
        self,
        question: str | None,
        conversation: Conversation | None,
        temperature: float,
        max_tokens: int,
    ) -> Iterator[tuple[list[Message], str, Conversation]]:
        """Answer a question, with an update of the page for each piece.

        Args:
            question: None or empty for a caption; a hidden textbox sends None.
            conversation: None before a picture is chosen.
            temperature: 0 for greedy decoding.
            max_tokens: Limit of the answer.

        Yields:
            The messages, the new text of the question box, and the conversation, which has the
            new turn at the end only.

        Raises:
            gr.Error: No picture is chosen, or the question cannot be answered.
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
                yield conversation.with_turn(question, text).messages(), "", conversation
        except PatchcacheError as error:
            raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from None
        conversation = conversation.with_turn(question, text)
        yield conversation.messages(), "", conversation

    def _pieces(
        self, question: str, conversation: Conversation, temperature: float, max_tokens: int
    ) -> Iterator[str]:
        sampling = make_sampling(temperature, secrets.randbits(32)) if temperature else None
        pieces = stream_answer(
            self.trained,
            conversation.patches_PD,
            question,
            turns=conversation.turns,
            max_tokens=max_tokens,
            sampling=sampling,
        )
        # The page shows the question before the model has read it.
        yield ""
        with closing(pieces):
            for piece in pieces:
                if self._closed.is_set():
                    return
                yield piece
