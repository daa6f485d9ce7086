"""Serving beside llama.cpp, transformers and vLLM: the same weights, prompts and numbers of tokens.

Sides take turns, each run in a process of its own. Run on an otherwise idle machine:
python benchmarks/serving.py [--quick] [--peer NAME]… [--streams N]… [--prompt short|long]… [--rounds N]
docs/benchmarks.md says how each figure is taken. Needs Linux, for /proc.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from serving_bench import HEAD, LONG, PEERS, SHORT, Bench, Cell, Failed, Figures, Peer
from serving_build import BUILT_FOR
from serving_weights import LLAMA_PYTHON
from training import Goal, processor

STREAMS = (1, 4, 16)
PROMPTS = {SHORT: 20, LONG: 1000}
"""Tokens."""
OURS, UNDRAFTED, BUILT, LLAMA = "ours", "undrafted", "llama.cpp ", ("llama.cpp ", "xllamacpp ")
"""How sides' names begin; that of llama.cpp as it is built for this processor, and of both.

How much drafts gain depends on what is answered, so the goals are beside ours without them."""


class Table:
    """What was measured."""

    def __init__(self, figures: Sequence[Figures]) -> None:
        self._figures = figures

    def best(self, names: str | tuple[str, ...], cell: Cell, key: str, *, least: bool = False) -> Figures | None:
        """Return the best of the sides whose names begin so, by the median of its rounds."""
        sides: dict[str, list[Figures]] = {}
        for one in self._figures:
            if one.peer.startswith(names) and one.cell == cell:
                sides.setdefault(one.peer, []).append(one)
        middle = [sorted(side, key=lambda one: getattr(one, key))[len(side) // 2] for side in sides.values()]
        pick = min if least else max
        return pick(middle, key=lambda one: getattr(one, key), default=None)

    def peak(self, names: str | tuple[str, ...]) -> int:
        """Return the most memory of any of them, in bytes."""
        return max((one.peak_bytes for one in self._figures if one.peer.startswith(names)), default=0)


Side = tuple[str | tuple[str, ...], Cell]
"""What the names of sides begin with, and what they were asked."""


def faster(table: Table, text: str, ours: Side, theirs: Side, times: float | None = None) -> Iterator[Goal]:
    """Yield the goal of so many times the tokens a second of others' best; without times: what is good to know."""
    mine, other = (table.best(*side, "tokens_per_second") for side in (ours, theirs))
    if mine and other:
        reached = mine.tokens_per_second / other.tokens_per_second
        speeds = f"{mine.tokens_per_second:.0f} / {other.tokens_per_second:.0f} tok/s ({other.peer})"
        yield Goal(text, f"{speeds}: {reached:.2f} times", None if times is None else reached >= times)


def sooner(table: Table, text: str, ours: Side, theirs: Side, *, goal: bool) -> Iterator[Goal]:
    """Yield the goal of a first token that is there no later than others'."""
    mine, other = (table.best(*side, "first_median", least=True) for side in (ours, theirs))
    if mine and other:
        seconds = f"{mine.first_median:.2f} / {other.first_median:.2f} s ({other.peer})"
        yield Goal(text, seconds, mine.first_median <= other.first_median if goal else None)


def goals(table: Table, outputs: int) -> Iterator[Goal]:
    """Yield what was to be reached, as far as it was measured."""
    one, many, mixed = (Cell(*size, SHORT, PROMPTS[SHORT], outputs) for size in ((1, 1), (16, 1), (16, 8)))
    long = Cell(1, 1, LONG, PROMPTS[LONG], outputs)
    like = f"{BUILT}BF16"
    yield from faster(table, "1 stream: as fast as llama.cpp built here", (UNDRAFTED, one), (BUILT, one), 1)
    yield from faster(table, "1 stream: beside like with like", (UNDRAFTED, one), (like, one))
    yield from faster(table, "1 stream: with drafts", (OURS, one), (BUILT, one))
    yield from faster(table, "16 streams, 8 adapters: 2.5 times its best", (UNDRAFTED, mixed), (LLAMA, many), 2.5)
    yield from faster(table, "16 streams, 8 adapters: beside like with like", (UNDRAFTED, mixed), (like, many))
    yield from faster(table, "16 streams, 8 adapters: with drafts", (OURS, mixed), (LLAMA, many))
    yield from sooner(table, "1,000 tokens: first token no later", (OURS, long), (LLAMA, long), goal=True)
    yield from sooner(table, "1,000 tokens: beside like with like", (OURS, long), (like, long), goal=False)
    yield from faster(table, "1 stream: over HTTP beside the engine alone", ("http", one), (OURS, one))
    yield from faster(table, "16 streams: over HTTP beside the engine alone", ("http", mixed), (OURS, mixed))
    if (mine := table.peak(OURS)) and (theirs := table.peak(LLAMA)):
        reached = f"{mine / 1e6:,.0f} / {theirs / 1e6:,.0f} MB"
        yield Goal("memory: the most of all runs, ours and llama.cpp's", reached)


def cells(options: argparse.Namespace, outputs: int) -> Iterator[Cell]:
    """Yield what is asked of each side that can do it."""
    for prompt in options.prompt or PROMPTS:
        for streams in options.streams or STREAMS:
            for adapters in (1, 8):
                if adapters == 1 or streams > 1:
                    yield Cell(streams, adapters, prompt, PROMPTS[prompt], outputs)


def measure(bench: Bench, peers: Sequence[Peer], todo: Sequence[Cell], rounds: int) -> Iterator[Figures]:
    """Let the sides take turns; a peer that fails is left out from then on."""
    failed: set[Peer] = set()
    for cell in todo:
        print(f"\n{cell}\n{HEAD}", flush=True)
        for number in range(rounds):
            for peer in peers:
                if peer in failed or not peer.takes(cell) or (number and peer.once):
                    continue
                try:
                    yield bench.run(peer, cell)
                except Failed as error:
                    if peer.name == OURS:
                        raise
                    failed.add(peer)
                    print(f"  {peer.name} is left out from here on: {error}", flush=True)


def chosen(names: Sequence[str] | None) -> Iterator[Peer]:
    """Yield the sides whose names begin so and that can be run here; say why others cannot."""
    for peer in PEERS:
        if names and not peer.name.startswith(tuple(names)):
            continue
        if reason := peer.missing():
            print(f"left out: {peer.name}: {reason}")
        else:
            yield peer


def main(options: argparse.Namespace) -> None:
    """Measure, then print the goals with what was reached."""
    outputs = 16 if options.quick else 64
    rounds = options.rounds or (1 if options.quick else 3)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch), os.cpu_count() or 1)
        print(f"{processor()}, {bench.threads} threads, load {os.getloadavg()[0]:.1f}")
        print(f"{bench.weights.version} in {'bfloat16' if bench.bf16 else 'float32'}{built()}", flush=True)
        peers = [*chosen(options.peer)]
        bench.prepare(peers)
        table = Table([*measure(bench, peers, [*cells(options, outputs)], rounds)])
        print("\n" + ", ".join(f"{name} {version}" for name, version in bench.versions.items()))
        print("\ngoals" + (" (quick: for figures run it without)" * options.quick))
        print(*(f"  {goal}" for goal in goals(table, outputs)), sep="\n")


def built() -> str:
    """Return for which instructions llama.cpp was built here."""
    note = LLAMA_PYTHON.parent.parent / BUILT_FOR
    return f"; llama.cpp built for {note.read_text('utf-8').strip()}" if note.exists() else ""


def arguments() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = ", ".join(peer.name for peer in PEERS)
    parser.add_argument("--peer", action="append", help=f"only sides whose names begin so, of: {names}")
    parser.add_argument("--streams", action="append", type=int, choices=STREAMS, help="only so many at a time")
    parser.add_argument("--prompt", action="append", choices=[*PROMPTS], help="only prompts of this length")
    parser.add_argument("--rounds", type=int, default=0, help="how often each is run; the median counts")
    parser.add_argument("--quick", action="store_true", help="short answers, once: to see that all works")
    return parser.parse_args()


if __name__ == "__main__":
    main(arguments())
