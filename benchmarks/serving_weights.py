"""What the serving benchmarks are run with: eight adapters, tuned in a minute, and GGUF files of the first.

Made once for each base model and kept: python serving_weights.py FOLDER [QUANTIZATION]… makes what is missing.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import cycle, islice
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console

from serving_job import Ask
from tunesmith import protos
from tunesmith.base_models.catalog import Catalog
from tunesmith.base_models.prompts import FORMATS, PromptFormat, Turn
from tunesmith.base_models.weights import Weights
from tunesmith.config import Settings
from tunesmith.errors import NotFound
from tunesmith.exports.gguf_file import GgufFile, Quantization
from tunesmith.exports.tuned import Tuned
from tunesmith.store.artifacts import ArtifactStore
from tunesmith.terminal import fetch_weights
from tunesmith.training import examples
from tunesmith.training.loop import Base, TuningRun

TASKS = ("changelogs", "numbers", "dates", "spelling", "sections", "changelogs", "numbers", "spelling")
"""What each adapter is tuned on; where two are tuned on the same task, they see other rows in another order."""
ROWS = 32
HERE = Path(__file__).parent
LLAMA_PYTHON = HERE.parent / ".bench" / "llama" / "bin" / "python"
ENDLESS = "endless"
"""The name of a prompt format like the model's own, whose answers nothing ends."""


def rows_of(task: str, part: str) -> list[tuple[str, str]]:
    """Return inputs and outputs of a part of a task: `train` or what is held out."""
    lines = (HERE / "tasks" / f"{task}.jsonl").read_text("utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return [(row["text_input"], row["output"]) for row in found if (row["part"] == "train") == (part == "train")]


def endless(weights: Weights) -> PromptFormat:
    """Return the format in which answers do not end, so that each has as many tokens as are asked for."""
    return FORMATS.setdefault(ENDLESS, replace(FORMATS[weights.model.prompt_format], stops=()))


def base_weights(settings: Settings) -> Weights:
    """Return the default base model's weights, fetched when they are not there."""
    return fetch_weights(Console(stderr=True), Catalog.load(settings).default, settings.cache_dir)


def folder_of(base: Weights) -> Path:
    """Return where adapters and files of a base model are kept."""
    return HERE.parent / ".bench" / "serving" / base.sha256[:12]


def artifacts_of(folder: Path) -> str:
    """Return the store's address."""
    return str(folder / "artifacts")


def adapter_path(number: int, kind: str = "adapters") -> str:
    """Return an adapter's path in the store; of kind `ENDLESS` its answers do not end."""
    return f"{kind}/{number}"


def gguf_path(folder: Path, quantization: str) -> Path:
    """Return the file with the first adapter merged into the weights."""
    return folder / f"merged-{quantization.lower()}.gguf"


def make(folder: Path, quantizations: Sequence[str]) -> None:
    """Make what is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = Settings.load()
    store, base = ArtifactStore(artifacts_of(folder)), base_weights(settings)
    endless(base)
    if missing := [number for number in range(len(TASKS)) if not published(store, adapter_path(number, ENDLESS))]:
        loaded = Base.load(base, torch.device("cpu"))
        for number in missing:
            publish(store, number, *tuned(loaded, number))
    for quantization in quantizations:
        if not gguf_path(folder, quantization).exists():
            write_gguf(folder, store, base, quantization)


def published(store: ArtifactStore, path: str) -> bool:
    """Return whether there is such an artifact."""
    try:
        store.manifest(path)
    except NotFound:
        return False
    return True


def tuned(base: Base, number: int) -> tuple[dict[str, bytes], dict[str, object]]:
    """Tune an adapter a little; return its files and its manifest."""
    rows = rows_of(TASKS[number], "train")
    taken = [rows[(number * ROWS + place) % len(rows)] for place in range(ROWS)]
    pairs = [protos.TuningExample(text_input=text, output=output) for text, output in taken]
    model = base.weights.model
    form = FORMATS[model.prompt_format]
    tokens = examples.tokenize(
        protos.TuningExamples(examples=pairs), form, base.tokenizer, model.tuning_token_limit
    )
    given = protos.Hyperparameters(epoch_count=2, batch_size=8, learning_rate=0.001)
    with TuningRun(base, tokens, given, seed=number) as run:
        for _ in run:
            pass
        return run.files(), run.manifest()


def publish(store: ArtifactStore, number: int, files: dict[str, bytes], manifest: dict[str, object]) -> None:
    """Store an adapter twice: as it is, and as one whose answers do not end."""
    store.publish(adapter_path(number), files, manifest)
    store.publish(adapter_path(number, ENDLESS), files, manifest | {"prompt_format": ENDLESS})
    print(f"adapter {number}: {TASKS[number]}", file=sys.stderr, flush=True)


def write_gguf(folder: Path, store: ArtifactStore, base: Weights, quantization: str) -> None:
    """Write a GGUF file of the first adapter; what our exporter does not write, llama.cpp makes of BF16."""
    file = gguf_path(folder, quantization)
    part = file.with_suffix(".part")
    if quantization in get_args(Quantization):
        made, files = datetime(2026, 1, 1, tzinfo=UTC), store.read(adapter_path(0))
        merged = Tuned("merged", "", made, base, files, base.model.prompt_format, 0.0, 1.0, 1)
        with part.open("wb") as out:
            out.writelines(GgufFile(merged, quantization).pieces())  # type: ignore[arg-type]
    else:
        source = gguf_path(folder, "BF16")
        if not source.exists():
            write_gguf(folder, store, base, "BF16")
        script = str(HERE / "serving_llama.py")
        subprocess.run([LLAMA_PYTHON, script, "--quantize", source, part, quantization], check=True)
    part.replace(file)


class Questions:
    """Inputs of given lengths, no two of which begin alike.

    Args:
        base: Whose tokenizer and format count.
    """

    def __init__(self, base: Weights) -> None:
        self._tokenizer, self._form = base.tokenizer(), FORMATS[base.model.prompt_format]
        self._texts = [text for text, _ in rows_of("changelogs", "held out") + rows_of("changelogs", "train")]

    def ask(self, number: int, adapter: int, tokens: int) -> Ask:
        """Return the question of a number, its prompt so many tokens long."""
        text = " ".join(islice(cycle(self._texts), number, number + 2 + tokens // 20))
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        for count in range(tokens, 0, -1):
            cut = self._tokenizer.decode(ids[:count])
            prompt = self._form.prompt(self._tokenizer, [Turn("user", cut)])
            if len(prompt) <= tokens:
                return Ask(cut, prompt, adapter)
        raise SystemExit(f"A prompt of {tokens} tokens is shorter than what is around each input")


if __name__ == "__main__":
    make(Path(sys.argv[1]), sys.argv[2:])
