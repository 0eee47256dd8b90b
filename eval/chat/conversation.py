"""What the page of `eval.serve` shows and does, apart from its looks: conversations, replies.

Each visitor's conversation is handed in and out; nothing of it is kept here.

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
from eval.ask import answer, make_sampling
from eval.chat.encoder import Vision
from eval.runs import LoadedRun
from eval.server.page_pictures import PagePictures
from eval.server.visitors import visitor_of_session
from eval.settings import EvaluateSettings

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

    def __init__(self, trained: LoadedRun, vision: Vision, pictures: PagePictures) -> None:
        self.trained = trained
        self.settings = trained.params.section("evaluate", EvaluateSettings)
        self._vision = vision
        self._pictures = pictures
        self._closed = threading.Event()

    def close(self) -> None:
        """End the answer that is being made."""
        self._closed.set()

    def begin(
        self, upload: dict[str, Any] | None, request: gr.Request
    ) -> tuple[Any, Conversation | None, list[Message]]:
        """Begin a conversation about a picture.

        Args:
            upload: What the visitor says of the file; its `path` is believed only if it was handed
                out to the visitor.
            request: Names the visitor's session.

        Returns:
            What becomes of the picture, the conversation, and its messages. A picture that cannot
            be read goes, and the page says why.
        """
        if upload is None:
            return gr.skip(), None, []
        try:
            name, data = self._pictures.read(
                upload["path"], visitor_of_session(request.session_hash)
            )
            conversation = Conversation(self._vision.look(data, name))
        except PatchcacheError as error:
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
        except PatchcacheError as error:
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
