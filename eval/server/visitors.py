"""Tells the visitors of the served page apart, so that none reaches another's conversation.

Gradio knows a visitor by a session hash that the browser chose, and believes whoever names it. So
each browser also gets a random secret as a cookie, and the session that Gradio sees is that of
both. A client without cookies shares the sessions of all such clients.
"""

import hashlib
import re
import secrets

SESSION_HASH = re.compile(r"[A-Za-z0-9_]{1,64}", re.ASCII)
"""Session hashes that the page's own script makes."""


def new_secret() -> str:
    """Return a secret for the cookie of a new visitor."""
    return secrets.token_urlsafe(32)


def visitor_of_secret(secret: str) -> str:
    """Return the visitor that a cookie's secret stands for; empty without a cookie."""
    return hashlib.sha256(secret.encode()).hexdigest()[:32]


def session_of(visitor: str, session_hash: str) -> str:
    """Return the session of a visitor, as Gradio sees it."""
    return f"{visitor}-{session_hash}"


def visitor_of_session(session: str) -> str:
    """Return the visitor that a session belongs to."""
    return session.partition("-")[0]
