"""Sorts questions by their first words, as VQA does (Antol et al. 2015, arXiv 1505.00468)."""

import re

OTHER = "other"

TYPES = {
    "yes or no": "is|are|was|were|do|does|did|can|could|has|have|will|would|should|isn't|aren't",
    "how many": "how many|how much",
    "what color": "what (?:colou?rs?|is the colou?rs?|are the colou?rs?)",
    "where": "where|in which (?:place|room|city|country)",
    "who": "who|whose",
    "why": "why",
    "how": "how",
    "which": "which",
    "describe": "describe|explain|analy[sz]e|provide|write|give|can you (?:describe|explain)|could "
    "you (?:describe|explain)",
    "what": "what(?:'s)?|what's|whats",
}
"""Type to the first words of its questions; the longest match decides."""

_BEGINNINGS = {name: re.compile(rf"(?:{words})\b", re.IGNORECASE) for name, words in TYPES.items()}


def question_type(question: str) -> str:
    """Return the type of a question: a key of `TYPES`, or `OTHER`.

    Words before a comma are skipped, as in "In the picture, what ...".
    """
    types = (_longest(part.strip()) for part in question.split(","))
    return next((found for found in types if found != OTHER), OTHER)


def _longest(question: str) -> str:
    matches = {name: words.match(question) for name, words in _BEGINNINGS.items()}
    lengths = {name: match.end() for name, match in matches.items() if match}
    return max(lengths, key=lengths.__getitem__, default=OTHER)
