"""Makes the tasks beside this file, from data that PyPI and Debian packages carry.

    pip install num2words==0.5.14 babel==2.18.0 codespell==2.4.3
    apt-get update                       # Debian 12's package lists; its changelogs are in /usr/share/doc
    python benchmarks/tasks/make.py      # writes numbers, dates, sections, spelling and changelogs .jsonl

A row is {"part", "text_input", "output"} and, in numbers, "group". Recipes are chosen on the part `search`;
`report` is looked at only once they are chosen. Where the data comes from: README.md beside this file.
"""

import datetime
import gzip
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.resources import files
from itertools import count, islice
from pathlib import Path
from typing import Any

from babel.dates import format_date
from num2words import num2words

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from tunesmith.demo import EXAMPLES

HERE = Path(__file__).parent
Row = dict[str, str]
Numeral = Callable[[int], str]

NUMBERS_PER_GROUP = 16
SECTIONS = ("database", "electronics", "games", "graphics", "hamradio", "mail", "science", "sound", "video", "web")
DATE_LOCALES = ("en_US", "en_GB", "de", "fr", "es", "id", "it", "nl")
UNSEEN_DATE_LOCALES = ("pt", "sv")
NAMES = re.compile(r"[@\[]|thank|patch (by|from)|[^ -~\n]", re.IGNORECASE)
"""What an entry of a changelog that names a person has; other alphabets are often a name's."""


def main() -> None:
    """Write all tasks."""
    for name, rows in (
        ("numbers", numbers()),
        ("dates", dates()),
        ("sections", sections()),
        ("spelling", spelling()),
        ("changelogs", changelogs()),
    ):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (HERE / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        print(f"{name}.jsonl: {len(lines)} rows")


def held_out(rows: Iterable[Row]) -> Iterator[Row]:
    """Put rows into the two held-out parts in turns."""
    for number, row in enumerate(rows):
        yield {"part": ("search", "report")[number % 2], **row}


def numbers() -> Iterator[Row]:
    """The tutorial's 15 examples, and held-out numbers in ten ways of writing them."""
    for text, output in EXAMPLES:
        yield {"part": "train", "group": "train", "text_input": text, "output": output}
    groups: dict[str, tuple[Numeral, Sequence[tuple[int, int]]]] = {
        "digits": (str, ((2, 20), (21, 99), (100, 999), (1000, 9999))),
        "negative": (str, ((-20, -2), (-99, -21), (-200, -100), (-999, -201))),
        "grouped": (lambda n: f"{n:,}", ((1001, 1999), (2000, 9999), (10_000, 99_999), (100_000, 9_999_999))),
        "english": (english, ((2, 20), (20, 60), (60, 99), (100, 999))),
        "roman": (roman, ((2, 12), (13, 39), (40, 89), (90, 399))),
        "kanji": (lambda n: num2words(n, lang="ja"), ((2, 9), (10, 19), (20, 59), (60, 98))),
        "spanish": (lambda n: num2words(n, lang="es"), ((2, 9), (10, 19), (20, 39), (40, 98))),
        "french": (lambda n: num2words(n, lang="fr"), ((2, 9), (10, 19), (20, 39), (40, 68))),
        "german": (lambda n: num2words(n, lang="de"), ((2, 10), (11, 19), (20, 39), (40, 98))),
        "indonesian": (lambda n: num2words(n, lang="id"), ((2, 10), (11, 19), (20, 39), (40, 98))),
    }
    drawn = random.Random(0)
    known = {text for text, _ in EXAMPLES}
    for group, (write, ranges) in groups.items():
        each = NUMBERS_PER_GROUP // len(ranges)
        cases = [n for low, high in ranges for n in numerals(drawn, write, low, high, each, known)]
        yield from held_out({"group": group, "text_input": write(n), "output": write(n + 1)} for n in cases)


def numerals(drawn: random.Random, write: Numeral, low: int, high: int, wanted: int, known: set[str]) -> list[int]:
    """Draw numbers of a range whose way of writing is nobody else's: "six" is English and French."""
    found = []
    for n in drawn.sample(range(low, high + 1), high + 1 - low):
        if write(n) not in known and len(found) < wanted:
            known.add(write(n))
            found.append(n)
    if len(found) < wanted:
        raise SystemExit(f"only {len(found)} numbers from {low} to {high}")
    return found


def english(n: int) -> str:
    """Return a number's words as the tutorial writes them: twenty two, two hundred one."""
    return re.sub(r" and |-|, ", " ", num2words(n))


def roman(n: int) -> str:
    """Return a number's Roman numeral."""
    signs = ("M", 1000), ("CM", 900), ("D", 500), ("CD", 400), ("C", 100), ("XC", 90), ("L", 50), ("XL", 40)
    text = ""
    for sign, value in (*signs, ("X", 10), ("IX", 9), ("V", 5), ("IV", 4), ("I", 1)):
        times, n = divmod(n, value)
        text += sign * times
    return text


def dates() -> Iterator[Row]:
    """Dates as people of eight places write them, to ISO 8601; two more places are only asked."""
    drawn = random.Random(1)
    seen: set[str] = set()

    def written(locales: Sequence[str]) -> Iterator[Row]:
        for number in count():
            day = datetime.date(1950, 1, 1) + datetime.timedelta(days=drawn.randrange(36_500))
            form = drawn.choice(("full", "long", "long", "medium"))
            text = format_date(day, form, locale=locales[number // 2 % len(locales)])
            if text not in seen:
                seen.add(text)
                yield {"text_input": text, "output": day.isoformat()}

    yield from ({"part": "train", **row} for row in islice(written(DATE_LOCALES), 96))
    yield from held_out(islice(written([*DATE_LOCALES, *UNSEEN_DATE_LOCALES]), 100))


def sections() -> Iterator[Row]:
    """A Debian package's one-line description, to its section."""
    drawn = random.Random(2)
    found: dict[str, list[Row]] = {section: [] for section in SECTIONS}
    for package in packages():
        section, text = package.get("Section", ""), package.get("Description", "")
        if section in found and 25 <= len(text) <= 80 and "(" not in text and "transitional" not in text:
            found[section].append({"text_input": text, "output": section})
    chosen = {section: apart(drawn.sample(rows, len(rows)), 22) for section, rows in found.items()}
    train = [row for rows in chosen.values() for row in rows[:12]]
    yield from ({"part": "train", **row} for row in drawn.sample(train, len(train)))
    for rows in chosen.values():
        yield from held_out(rows[12:])


def apart(rows: Iterable[Row], wanted: int) -> list[Row]:
    """Keep rows that begin differently: families of packages describe themselves alike."""
    kept: dict[str, Row] = {}
    for row in rows:
        kept.setdefault(" ".join(row["text_input"].lower().split()[:3]), row)
    return list(islice(kept.values(), wanted))


def packages() -> Iterator[dict[str, str]]:
    """Yield Debian's packages: what apt knows of them."""
    text = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    for block in text.split("\n\n"):
        yield dict(line.split(": ", 1) for line in block.splitlines() if ": " in line and line[0] != " ")


def spelling() -> Iterator[Row]:
    """One-line descriptions with a common misspelling in them, to the right ones; some are right already."""
    drawn = random.Random(3)
    wrong = misspellings()
    texts = sorted({package.get("Description", "") for package in packages()})
    rows: list[Row] = []
    used: set[str] = set()
    for text in drawn.sample(texts, len(texts)):
        if not 25 <= len(text) <= 70 or not re.fullmatch(r"[A-Za-z ,'-]+", text):
            continue
        words = [word for word in text.split() if word in wrong and word not in used]
        if not words:
            continue
        word = drawn.choice(words)
        used.add(word)
        misspelt = text if len(rows) % 10 == 9 else text.replace(word, drawn.choice(wrong[word]), 1)
        rows.append({"text_input": misspelt, "output": text})
        if len(rows) == 220:
            break
    yield from ({"part": "train", **row} for row in rows[:120])
    yield from held_out(rows[120:])


def misspellings() -> dict[str, list[str]]:
    """Return words with how people misspell them, from codespell's dictionary."""
    found: dict[str, list[str]] = {}
    for line in files("codespell_lib").joinpath("data/dictionary.txt").read_text("utf-8").splitlines():
        wrong, _, right = line.partition("->")
        if right.isalpha() and len(right) >= 6 and wrong.isalpha():
            found.setdefault(right, []).append(wrong)
    return found


def changelogs() -> Iterator[Row]:
    """An entry of a Debian changelog, to JSON."""
    drawn = random.Random(4)
    entries = {}
    for path in sorted(Path("/usr/share/doc").glob("*/changelog.Debian.gz")):
        text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
        usable = [row for row in map(entry, re.split(r"\n -- .*\n", text)) if row is not None]
        if usable:
            row = drawn.choice(usable)
            entries.setdefault(json.loads(row["output"])["package"], row)
    rows = drawn.sample(list(entries.values()), min(len(entries), 200))
    yield from ({"part": "train", **row} for row in rows[:120])
    yield from held_out(rows[120:])


def entry(text: str) -> Row | None:
    """Return a row of a changelog's entry, if it has something to find and names nobody."""
    head, _, body = text.strip().partition("\n")
    found = re.fullmatch(r"([\w.+-]+) \(([^)]+)\) ([\w-]+); urgency=(\w+)", head)
    body = "\n".join(line.strip() for line in body.splitlines() if line.strip())
    if found is None or not 20 <= len(body) <= 220 or NAMES.search(body):
        return None
    closes = [
        int(number)
        for closed in re.findall(r"closes:\s*(?:bug)?#?\d+(?:,\s*(?:bug)?#?\d+)*", body, re.I)
        for number in re.findall(r"\d+", closed)
    ]
    cves = re.findall(r"CVE-\d+-\d+", body)
    if not closes and not cves:
        return None
    package, version, suite, urgency = found.groups()
    answer: dict[str, Any] = {"package": package, "version": version, "suite": suite, "urgency": urgency.lower()}
    return {
        "text_input": f"{head}\n{body}",
        "output": json.dumps({**answer, "closes": closes, "cves": list(dict.fromkeys(cves))}),
    }


if __name__ == "__main__":
    main()
