"""Splits captions into the tokens that the official COCO caption evaluation counts.

Follows the Stanford PTB tokenizer of CoreNLP 3.4.1 (lower case, punctuation removed), which the
official evaluation runs in Java; the rules were found by comparing outputs.
"""

import re

_LETTER = r"(?:[^\W\d_²³¹¼-¾⁰-₉⅐-⅞]|[\u0300-\u036f\u0900-\u0f7f])"
_ALNUM = rf"(?:{_LETTER}|\d)"
_WORD_END = rf"(?!{_LETTER})"
_HYPHENS = "-\u2010\u2011"

_REPLACEMENTS = {
    **dict.fromkeys("\u2018\u2019\u201b\x91\x92", "'"),
    **dict.fromkeys("\u2012\u2013\u2014\u2015\x96\x97", " -- "),
    **{"&mdash;": " -- ", "&ndash;": " -- ", "&nbsp;": " ", "&quot;": ' " ', "&apos;": "'"},
    **{"&amp;": "&", "&lt;": " < ", "&gt;": " > ", "\u2026": " ... ", "\u00ad": ""},
    **{"£": " # ", "€": " $ ", "¤": " $ ", "¢": " cents "},
}
_REPLACED = re.compile("|".join(map(re.escape, _REPLACEMENTS)))

# Characters that the Java program drops, which then separate words: everything beyond the basic
# plane (emoji), joiners, variation selectors, late currency signs.
_LOST = re.compile(
    r"[\U00010000-\U0010ffff\u200b-\u200f\ufe00-\ufe0f\ufeff\u20a9\u20ab\u20ad-\u20bf]"
)

_ABBREVIATIONS = (
    "adm|adv|al|ala|alex|apr|ariz|assn|asst|atty|attys|aug|ave|bhd|bldg|blvd|bros|calif|capt|cf|"
    "cie|cmdr|co|col|colo|conn|corp|cos|cpl|ct|dec|dept|det|dr|drs|elec|ens|esq|est|etc|feb|fla|"
    "fri|ft|ga|gen|gov|govs|hon|inc|ind|insp|intl|invt|jan|jos|jr|jul|jun|kan|kans|ky|lieut|lt|"
    "ltd|maj|mar|md|messrs|mich|minn|mlle|mme|mo|mon|mont|mr|mrs|ms|msgr|mt|natl|neb|nev|nov|oct|"
    r"okla|penn|pfc|ph|ph\.d|plc|pres|prof|pvt|rd|rep|reps|rev|rt|sen|sens|sep|sept|sgt|sq|sr|st|"
    "ste|supt|sys|tel|tenn|thu|thurs|treas|tue|tues|univ|va|vs|vt|wed|wis|wisc|wm|wyo"
)
_CAPITAL_ABBREVIATIONS = "Ark|Az|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash"

# A full stop between a lone letter and one of these words ends a sentence, not an abbreviation.
_SENTENCE_STARTERS = (
    "A|About|According|Additionally|After|An|As|At|But|He|Her|Here|However|If|In|It|Many|More|"
    "Now|Once|One|Other|Our|She|Since|So|Some|Such|That|The|Their|Then|There|These|They|This|We|"
    "What|When|While|Yet|You"
)

_WEB = (
    r"</?[A-Za-z][\w:.-]*(?: [\w:.-]+(?: ?= ?(?:'[^']*'|\"[^\"]*\"|[\w:.-]+))?)* ?/?>|<!--.*?-->",
    r"https?://[^\s\"<>|()]+[^\s\"<>|.!?(){},-]",
    rf"(?:www\.(?:[\w-]+\.)+[A-Za-z]{{2,4}}|(?:[\w-]+\.)+(?:com|net|org|edu){_WORD_END})"
    r"(?:/[^\s\"<>|()]*[^\s\"<>|.!?(){},-])?",
    r"[\w.+-]+@[\w-]+(?:\.[\w-]+)*",
    r"@[A-Za-z_]\w*|#[A-Za-z]+",
    r"[<>]?[:;=]['\-o*]?[()@{|\[\]\\DPdpO](?![A-Za-z])",
)
_COMPOUNDS = (
    r"\([0-9]{2,3}\) ?[0-9]{3,4}[- ]?[0-9]{3,5}",
    r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}(?!\d)",
    r"(?:\d{1,4}[- ])?\d{1,4}\\?/\d{1,4}(?![\w/-])",
    # Full stops and commas may come before the first hyphen: 1,000-pound.
    rf"[A-Za-z0-9][A-Za-z0-9.,]*(?:-[A-Za-z0-9]+)+(?![\w'/&])(?!-{_ALNUM})",
)
_CONTRACTIONS = (
    rf"(?:[A-HJ-XZn]|[dDoOlL])'(?!(?:re|ve|ll)\b){_LETTER}{{2}}{_ALNUM}*",
    rf"{_LETTER}+(?=(?i:n't))|(?i:n't)",
    r"(?i:can(?=not\b(?!'))|(?:gon|wan)(?=na\b(?!['-]))|got(?=ta\b(?!['-])))",
    r"(?i:(?:lem|gim)(?=me\b(?!['-]))|'t(?=(?:is|was)(?:\b|n't)))",
)
_STOPS = (
    rf"(?:{_CAPITAL_ABBREVIATIONS}|(?i:{_ABBREVIATIONS}))\.{_WORD_END}",
    r"(?i:no)\.(?=\s*\d)",
    rf"[A-Za-z](?:\.[A-Za-z])+\.{_WORD_END}",
    rf"[A-Za-z]\.{_WORD_END}(?!\s+(?:{_SENTENCE_STARTERS})(?!\S))",
)
_APOSTROPHES = (
    rf"'(?i:[msd]|re|ve|ll){_WORD_END}",
    rf"'(?:em|til{_WORD_END}|cause{_WORD_END}|n'|n{_WORD_END}|\d0s)|(?<!\w)'\d\d(?!')",
    rf"(?i:ma'am|c'mon|cap'n|s'mores|e'er|ne'er){_WORD_END}|(?i:ol|[djly])'",
)
_WORDS = (
    r"[A-Z]*\$",
    r"[A-Z]+(?:[+&][A-Z]+)+|C\+\+|C#",
    r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}",
    r"[-+]?(?:\d*(?:[.,:]\d+)+)|[-+]\d+",
    rf"{_LETTER}+\.(?=[,;:])",
    rf"{_LETTER}{_ALNUM}*(?:[.!?]{_LETTER}{_ALNUM}*)+",
    rf"{_ALNUM}+(?:[{_HYPHENS}_]{_ALNUM}+)*",
    r"[?!]+|-{5,}|_+|\*+|#+|@+|<<|>>",
    r"\S",
)
# The Java program takes the longest match, `re` the first, so longer patterns come first.
_TOKEN = re.compile(
    "|".join(
        f"(?:{pattern})"
        for pattern in _WEB + _COMPOUNDS + _CONTRACTIONS + _STOPS + _APOSTROPHES + _WORDS
    )
)

_SPELLINGS = str.maketrans(
    {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
    | {"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", " ": "\u00a0"}
)
_PUNCTUATION = frozenset("'`\"“”«»\u2039\u203a.?!,:;" + _HYPHENS)


def tokenize_caption(caption: str) -> list[str]:
    """Split one caption into tokens.

    A line break counts as a space, while the Java program would start the next caption there.

    Args:
        caption: Any text, possibly empty.

    Returns:
        Tokens in lower case, without punctuation. A number and its fraction are one token with a
        no-break space inside, as in the original.
    """
    text = " ".join(caption.split())
    text = _REPLACED.sub(lambda match: _REPLACEMENTS[match[0]], text)
    text = " ".join(_LOST.sub(" ", text).split())
    tokens = (match[0] for match in _TOKEN.finditer(text))
    return [_normalized(token) for token in tokens if token not in _PUNCTUATION]


def _normalized(token: str) -> str:
    return token.lower().translate(_SPELLINGS)
