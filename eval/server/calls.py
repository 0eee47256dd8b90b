"""Rebuilds a call of the served page from values that the page's components can send.

Gradio accepts most of what a call holds: file paths, values outside of a slider's range, numbers
of functions that do not exist. Some of these end in a traceback.
"""

import json
from typing import Any

import gradio as gr

from eval.server.sessions import SESSION_HASH

MAX_PATH = 4096
"""Characters."""


class UnknownFunctionError(LookupError):
    """A call of a function that the page does not have."""


def clean_call(page: gr.Blocks, body: bytes, *, queued: bool) -> dict[str, Any]:
    """Return a call as the page itself would make it.

    Args:
        page: The page whose function is called.
        body: JSON from a client.
        queued: Whether the call goes through the queue; each function has one way only.

    Returns:
        Data, function number and session hash; all else is dropped.

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
        raise ValueError("the number of values is not the number of inputs")
    values = [_clean(*pair) for pair in zip(function.inputs, data, strict=True)]
    return {"data": values, "fn_index": index, "session_hash": session_hash}


def _clean(component: gr.blocks.Block, value: Any) -> Any:
    """Return a value that a component can send.

    Raises:
        ValueError: The component cannot send this value.
    """
    if isinstance(component, gr.State):
        # Gradio takes the state that the server holds.
        return None
    if isinstance(component, gr.Image):
        # Only the path is kept: Gradio would open files that other fields name.
        path = value.get("path") if isinstance(value, dict) else None
        return None if value is None else {"path": _clean_text(path, MAX_PATH)}
    if isinstance(component, gr.Textbox):
        return None if value is None else _clean_text(value, component.max_length)
    if isinstance(component, gr.Slider):
        return _clean_number(value, component.minimum, component.maximum)
    if isinstance(component, gr.Dataset):
        return int(_clean_number(value, 0, len(component.samples) - 1))
    raise ValueError(f"{type(component).__name__} sends nothing")


def _clean_text(value: Any, max_length: int) -> str:
    if not isinstance(value, str) or len(value) > max_length:
        raise ValueError("not a text of this length")
    value.encode()
    return value


def _clean_number(value: Any, least: float, most: float) -> int | float:
    # The comparison also refuses NaN.
    if type(value) not in (int, float) or not least <= value <= most:
        raise ValueError("not a number in the range")
    number: int | float = value
    return number
