"""Checks what a client asks the functions of the served page to do, before Gradio sees it.

Gradio believes most of a call: file paths, values outside of a slider's range, numbers of
functions that do not exist. Some of it ends in a traceback. So a call is rebuilt from the values
that the page's own components can send, and from nothing else.
"""

import json
from typing import Any

import gradio as gr

from eval.server.visitors import SESSION_HASH

MAX_PATH = 4096
"""Characters."""


class UnknownFunctionError(LookupError):
    """A call of a function that the page does not have."""


def clean_call(page: gr.Blocks, body: bytes, *, queued: bool) -> dict[str, Any]:
    """Return a call as the page itself would make it.

    Args:
        page: Whose function is called.
        body: JSON as it came.
        queued: Whether it is to wait in the queue; each function is called in one way alone.

    Returns:
        The call without all that the page's functions do not need.

    Raises:
        UnknownFunctionError: The page has no such function.
        ValueError: The page cannot make such a call.
    """
    try:
        call = json.loads(body)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(call, dict):
        raise ValueError("not an object")
    session_hash, index, data = (call.get(key) for key in ("session_hash", "fn_index", "data"))
    if not isinstance(session_hash, str) or not SESSION_HASH.fullmatch(session_hash):
        raise ValueError("not a session hash")
    function = page.fns.get(index) if type(index) is int else None
    if function is None or function.queue is not queued:
        raise UnknownFunctionError(index)
    if not isinstance(data, list) or len(data) != len(function.inputs):
        raise ValueError("not as many values as the function has inputs")
    values = [_clean(*pair) for pair in zip(function.inputs, data, strict=True)]
    return {"data": values, "fn_index": index, "session_hash": session_hash}


def _clean(component: gr.blocks.Block, value: Any) -> Any:
    """Return what a component can send.

    Raises:
        ValueError: It cannot send such a value.
    """
    if isinstance(component, gr.State):
        # What the server holds counts.
        return None
    if isinstance(component, gr.Image):
        return _clean_picture(value)
    if isinstance(component, gr.Textbox):
        return None if value is None else _clean_text(value, component.max_length)
    if isinstance(component, gr.Slider):
        return _clean_number(value, component.minimum, component.maximum)
    if isinstance(component, gr.Dataset):
        return int(_clean_number(value, 0, len(component.samples) - 1))
    raise ValueError(f"{type(component).__name__} sends nothing")


def _clean_picture(value: Any) -> dict[str, str] | None:
    """Return its path alone, of which Gradio opens nothing."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError("not a file")
    return {"path": _clean_text(value.get("path"), MAX_PATH)}


def _clean_text(value: Any, most: int) -> str:
    if not isinstance(value, str) or len(value) > most:
        raise ValueError("not a text of this length")
    value.encode()
    return value


def _clean_number(value: Any, least: float, most: float) -> int | float:
    # NaN lies in no range.
    if type(value) not in (int, float) or not least <= value <= most:
        raise ValueError("not a number in the range")
    number: int | float = value
    return number
