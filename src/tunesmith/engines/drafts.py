"""Guesses of how an answer goes on, from the outputs that its adapter was tuned on, and from its own prompt.

A guess never changes an answer: the model computes in one pass what follows each guessed token, and what it would
not have chosen itself is dropped. Speculative decoding as in Leviathan et al. 2023, with tables in the place of a
small model; a choice is fixed by its place's random number, so that to compare is enough.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, Self

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

FILE = "outputs_trie.safetensors"
"""Where an artifact has it."""

DEPTH = 4
"""Tokens of the longest run that a trie knows."""

TOKENS = 1 << 16
"""Tokens of outputs that a trie is made of; of more, some rows are left out."""

LEAST_SHARE = 0.25
"""What follows a run less often is not worth a guess."""

TRUST = 0.7
"""How likely a guess is right before any was compared, as a share of what its source says."""

LEARNING = 0.2
"""How fast that changes."""

DEARER = 0.4
"""By how much of the shortest pass each further step of tokens makes a pass longer."""

_BEGINNING = -1
_ALL_BITS = (1 << 64) - 1


class OutputTrie:
    """A trie of the runs of up to `DEPTH` tokens in outputs, each with what most often follows it.

    A run at the beginning of an output is another one than the same within. The nodes are a table: each is named
    by a hash of its run, as a guess that is wrong once in 2^40 times does no harm.

    Args:
        nodes: Their names, ascending, uint64.
        tokens: What follows each.
        shares: How often it is what follows.
    """

    def __init__(self, nodes: NDArray[np.uint64], tokens: NDArray[np.int32], shares: NDArray[np.float32]) -> None:
        self._nodes, self._tokens, self._shares = nodes, tokens, shares

    @classmethod
    def of(cls, outputs: Sequence[Sequence[int]]) -> Self:
        """Make the trie of outputs, their ends included."""
        every = -(-sum(map(len, outputs)) // TOKENS)
        followers: defaultdict[int, Counter[int]] = defaultdict(Counter)
        for output in outputs[:: max(every, 1)]:
            for place, token in enumerate(output):
                for run in _runs(output[max(place - DEPTH, 0) : place]):
                    followers[run][token] += 1
        likely = []
        for run, counts in followers.items():
            token, count = counts.most_common(1)[0]
            if count >= LEAST_SHARE * counts.total():
                likely.append((run, token, count / counts.total()))
        nodes, tokens, shares = zip(*sorted(likely), strict=True) if likely else ((), (), ())
        return cls(np.array(nodes, np.uint64), np.array(tokens, np.int32), np.array(shares, np.float32))

    @classmethod
    def read(cls, content: bytes) -> Self:
        """Return a trie that `content` wrote."""
        return cls(**safetensors.numpy.load(content))

    @property
    def content(self) -> bytes:
        """The trie as a file."""
        return safetensors.numpy.save({"nodes": self._nodes, "tokens": self._tokens, "shares": self._shares})

    def next(self, answer: Sequence[int]) -> tuple[int, float] | None:
        """Return what most often follows the longest end of an answer that is known, and how often it does."""
        runs = np.array([*_runs(answer)], np.uint64)
        for run, place in zip(reversed(runs), reversed(np.searchsorted(self._nodes, runs)), strict=True):
            if place < len(self._nodes) and self._nodes[place] == run:
                return int(self._tokens[place]), float(self._shares[place])
        return None


def _runs(tokens: Sequence[int]) -> Iterator[int]:
    """Yield the names of the last runs of an output's beginning, from the shortest to the longest."""
    run = 0
    for back in range(1, DEPTH + 1):
        token = tokens[-back] if back <= len(tokens) else _BEGINNING
        run = ((run ^ (token + 2)) * 0x9E3779B97F4A7C15) & _ALL_BITS
        run ^= run >> 29
        yield run
        if token == _BEGINNING:
            return


class Guess(NamedTuple):
    """A guessed token.

    Attributes:
        token: Its id.
        chance: How likely it and all before it are right.
        source: Where it comes from.
    """

    token: int
    chance: float
    source: int


class Drafter:
    """Guesses how one answer goes on.

    Args:
        outputs: What its adapter was tuned on; None when that is not known.
        prompt: What it answers.
    """

    def __init__(self, outputs: OutputTrie | None, prompt: Sequence[int]) -> None:
        self._outputs = outputs
        self._prompt = len(prompt)
        self._text = list(prompt)
        self._after = {pair: place for place, pair in enumerate(pairwise(prompt[:-1]), 2)}
        """Where in the text it goes on after the last time that two tokens came together."""
        self._trust = [TRUST, TRUST]

    def take(self, token: int) -> None:
        """Go on by a token of the answer."""
        if len(self._text) > 1:
            self._after[self._text[-2], self._text[-1]] = len(self._text)
        self._text.append(token)

    def learn(self, guess: Guess, right: bool) -> None:
        """Trust a source more, or less."""
        self._trust[guess.source] += LEARNING * (right - self._trust[guess.source])

    def guesses(self, most: int, least: float) -> list[Guess]:
        """Return up to `most` guesses of what comes next, as long as their chance is at least `least`."""
        found: list[Guess] = []
        text, chance, place = [*self._text], 1.0, None
        while len(found) < most:
            if place is None:
                place = self._after.get((text[-2], text[-1])) if len(text) > 1 else None
            copied = None if place is None else text[place]
            options = self._options(text[max(self._prompt, len(text) - DEPTH) :], copied, chance)
            best = max(options, key=lambda guess: guess.chance, default=None)
            if best is None or best.chance < least:
                break
            found.append(best)
            text.append(best.token)
            chance = best.chance
            place = place + 1 if place is not None and best.token == copied else None
        return found

    def _options(self, answer: Sequence[int], copied: int | None, chance: float) -> Iterator[Guess]:
        if self._outputs and (likely := self._outputs.next(answer)):
            yield Guess(likely[0], chance * likely[1] * self._trust[0], 0)
        if copied is not None:
            yield Guess(copied, chance * self._trust[1], 1)


def worth(guesses: Sequence[Sequence[Guess]], step: int) -> list[int]:
    """Return how many of each request's guesses make the most tokens a second.

    Args:
        guesses: Of each request of a pass, which has one token besides.
        step: So many tokens take as long as one.
    """
    likely = sorted(
        (
            (guess.chance, -place, -number)
            for number, some in enumerate(guesses)
            for place, guess in enumerate(some)
        ),
        reverse=True,
    )
    passes = -(-len(guesses) // step)
    right, seconds = float(len(guesses)), 1.0 + DEARER * (passes - 1)
    kept = passes * step - len(guesses)
    right += sum(chance for chance, *_ in likely[:kept])
    while kept < len(likely):
        more = right + sum(chance for chance, *_ in likely[kept : kept + step])
        if more / (seconds + DEARER) <= right / seconds:
            break
        right, seconds, kept = more, seconds + DEARER, kept + step
    counts = [0] * len(guesses)
    for _, _, number in likely[:kept]:
        counts[-number] += 1
    return counts
