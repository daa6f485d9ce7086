"""The embedded rater: words and phrases, and what stands near them. It knows English, and no meaning."""

import re
import tomllib
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.resources import files

from tunesmith import protos
from tunesmith.caller import Caller
from tunesmith.safety.base import Probabilities

WINDOW, OVERLAP = 600, 120  # characters: what is found adds up within a window, not over a book
NEAR = 60  # characters between the two words of a pair
STRONG, WEAK = 2.0, 0.6
CUTS = (1.0, 2.0, 4.0)
"""From which score on a text is LOW, MEDIUM, HIGH."""

_NAMES = ("SEXUALLY_EXPLICIT", "HATE_SPEECH", "HARASSMENT", "DANGEROUS_CONTENT")
_LEET = str.maketrans("@013457$", "aoieasts")
_DISGUISED = re.compile(r"(?<![\w.])(?=\w*[a-z@$])(?=\w*[@$\d])[a-z@$013457]{3,}(?![\w.])")
_STRETCHED = re.compile(r"([a-z])\1{2,}")
_SPACE = re.compile(r"\s+")
_NOTHING = re.compile(r"(?!)")


class LexiconRater:
    """Counts what lexicon.toml lists; the same text is always rated the same."""

    every = 80

    def rate(self, text: str, _question: str | None, _caller: Caller, /) -> Probabilities:
        """See Rater."""
        plain = _plain(text)
        scores = [max(map(category.score, _windows(plain))) for category in _categories()]
        return tuple(protos.SafetyRating.NEGLIGIBLE + sum(score >= cut for cut in CUTS) for score in scores)


class Category:
    """What one category looks for.

    Args:
        entries: Its table in lexicon.toml.
    """

    def __init__(self, entries: dict[str, list[str]]) -> None:
        self._strong, self._weak = _words(entries["strong"]), _words(entries["weak"])
        first, second = entries.get("pairs") or ([], [])
        self._first, self._second = _words(first), _words(second)
        self._fine, self._softer = _words(entries["fine"]), _words(entries["softer"])

    def score(self, text: str) -> float:
        """Return how much of it is in a text in plain small letters; 0 for nothing."""
        text = self._fine.sub(" ", text)
        strong = {match[0] for match in self._strong.finditer(text)}
        rest = self._strong.sub(" ", text) if strong else text  # or a phrase would count again by its words
        pairs = set(self._pairs(rest))
        weak = {match[0] for match in self._weak.finditer(rest)} - pairs
        score = STRONG * (len(strong) + len(pairs)) + WEAK * len(weak)
        return score / 2 if score and self._softer.search(text) else score

    def _pairs(self, text: str) -> Iterator[str]:
        """Yield the second word of each pair, which says what it is about."""
        starts = [match.span() for match in self._first.finditer(text)]
        if not starts:
            return
        for match in self._second.finditer(text):
            begin, end = match.span()
            if any(begin - NEAR <= last <= begin or end <= first <= end + NEAR for first, last in starts):
                yield match[0]


@cache
def _categories() -> tuple[Category, ...]:
    table = tomllib.loads(files(__package__).joinpath("lexicon.toml").read_text("utf-8"))
    return tuple(Category(table[name]) for name in _NAMES)


def _words(entries: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern of whole words; a * that follows a letter stands for any ending."""
    found = [re.sub(r"(?<=[a-z])\*", r"\\w*", entry) for entry in entries]
    return re.compile(rf"\b(?:{'|'.join(found)})\b") if found else _NOTHING


def _plain(text: str) -> str:
    """Return a text in small letters, without disguises."""
    small = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    small = _DISGUISED.sub(lambda match: match[0].translate(_LEET), small)
    return _SPACE.sub(" ", _STRETCHED.sub(r"\1", small))


def _windows(text: str) -> Iterator[str]:
    yield text[:WINDOW]
    for start in range(WINDOW - OVERLAP, len(text) - OVERLAP, WINDOW - OVERLAP):
        yield text[start : start + WINDOW]
