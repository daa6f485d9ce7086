"""The tutorial's model, from the real base model: other programs answer what the service answers."""

import tempfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from google.protobuf.json_format import ParseDict
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from exports import models
from exports.llama import ask
from tunesmith import protos
from tunesmith.base_models import weights
from tunesmith.base_models.catalog import Catalog
from tunesmith.base_models.prompts import FORMATS as PROMPTS
from tunesmith.base_models.prompts import Turn
from tunesmith.config import Settings
from tunesmith.demo import TUNED_MODEL
from tunesmith.engines import torch_engine
from tunesmith.engines.base import Sampling
from tunesmith.exports import templates
from tunesmith.exports.formats import FORMATS, PIECE
from tunesmith.exports.gguf_file import Quantization
from tunesmith.exports.tuned import Tuned
from tunesmith.store.artifacts import ArtifactStore
from tunesmith.training import examples
from tunesmith.training.loop import Base, TuningRun

pytestmark = pytest.mark.weights

MOST = 12  # tokens of an answer
QUESTIONS = (
    *("LXIII", "六", "1", "-3", "twenty two", "ninety nine", "1,000", "seven", "41", "100", "-10", "2,999"),
    *("forty", "one hundred", "XII", "IX", "十二", "eight", "three hundred", "eleven", "siebzehn", "dix"),
    *("  spaced   out", "What is 2+2?"),
)


@pytest.fixture(scope="module")
def trained() -> tuple[Tuned, dict[str, Any]]:
    """The tutorial's model, and its adapter's manifest."""
    settings = Settings.load()
    base = weights.ensure(Catalog.load(settings).default, settings.cache_dir)
    loaded, model = Base.load(base, torch.device("cpu")), base.model
    data = ParseDict(TUNED_MODEL["tuning_task"]["training_data"]["examples"], protos.TuningExamples())
    rows = examples.tokenize(data, PROMPTS[model.prompt_format], loaded.tokenizer, model.tuning_token_limit)
    given = protos.Hyperparameters(epoch_count=5, batch_size=4, learning_rate=0.001)
    with TuningRun(loaded, rows, given, seed=0) as run:
        for _ in run:
            pass
        return models.tuned(base, run.adapter.to_files(model.id)), run.manifest()


@pytest.fixture(scope="module")
def tuned(trained: tuple[Tuned, dict[str, Any]]) -> Tuned:
    return trained[0]


@pytest.fixture(scope="module")
def answers(trained: tuple[Tuned, dict[str, Any]]) -> list[str]:
    """What our engine answers; in float32, in which all programs compute alike."""
    tuned, manifest = trained
    store = ArtifactStore("memory://real-weights")
    store.publish("adapter", tuned.adapter, manifest)
    sampling, gone, found = Sampling(0, 1, 0, MOST), threading.Event(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_engine, "compute_dtype", lambda device: torch.float32)
        engine = torch_engine.TorchEngine(store, Settings.load().cache_dir, device="cpu")
        for question in QUESTIONS:
            chunks = engine.generate(tuned.base.model, "adapter", [Turn("user", question)], sampling, gone)
            found.append("".join(chunk.text for chunk in chunks))
        engine.close()
    assert found[:2] == ["LXIV", "七"]
    return found


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder that is gone afterwards: half a gigabyte is too much to keep for three runs."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def fetched(tuned: Tuned, kind: str, scratch: Path, quantization: Quantization = "F16") -> Path:
    """Write an export; return the file, or the folder that a zip file holds."""
    download = FORMATS[kind](tuned, quantization)
    file = scratch / download.filename
    with file.open("wb") as written:
        for piece in download.pieces:
            assert len(piece) <= PIECE
            written.write(piece)
    assert file.stat().st_size == download.size
    if file.suffix != ".zip":
        return file
    with zipfile.ZipFile(file) as archive:
        archive.extractall(scratch)
    file.unlink()
    return scratch / file.stem


def alike(found: list[str], answers: list[str]) -> int:
    """How many answers are the same, without the space that opens each and is no part of it."""
    return sum(mine.removeprefix(" ") == theirs for mine, theirs in zip(found, answers, strict=True))


def test_plain_peft(tuned: Tuned, answers: list[str], scratch: Path) -> None:
    adapter = fetched(tuned, "PEFT", scratch)
    model = peft.PeftModel.from_pretrained(tiny.reference_model(tuned.base), str(adapter)).eval()
    tokenizer, form = tuned.base.tokenizer(), tuned.format
    stops, found = form.stop_tokens(tokenizer), []
    for question in QUESTIONS:
        prompt = form.prompt(tokenizer, [Turn("user", question)])
        found.append(tokenizer.decode(tiny.greedy(model, prompt, MOST, stops)))
    assert alike(found, answers) == len(QUESTIONS)


def test_plain_transformers(tuned: Tuned, answers: list[str], scratch: Path) -> None:
    """The merged weights are rounded to bfloat16, which may turn a near tie."""
    folder = fetched(tuned, "SAFETENSORS", scratch)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    found = []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        tokens = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
        with torch.inference_mode():
            answer = model.generate(**tokens, max_new_tokens=MOST)[0, tokens["input_ids"].shape[1] :]
        found.append(tokenizer.decode(answer, skip_special_tokens=True))
    assert alike(found, answers) >= len(QUESTIONS) - 3


@pytest.mark.parametrize(("quantization", "different"), [("F16", 1), ("Q8_0", 4)])
def test_llama_cpp(
    tuned: Tuned, answers: list[str], scratch: Path, quantization: Quantization, different: int
) -> None:
    """Near ties may turn: of F16 none did when this was written, of Q8_0 two of thirty."""
    file = fetched(tuned, "GGUF", scratch, quantization)
    said = ask(file, [templates.prompt(tuned.format, question) for question in QUESTIONS], MOST, models.TEXTS)
    tokenizer = tuned.base.tokenizer()
    assert said.tokens == [tokenizer.encode(text, add_special_tokens=False).ids for text in models.TEXTS]
    assert alike(said.answers, answers) >= len(QUESTIONS) - different


def test_ollamas_files_belong_together(tuned: Tuned, scratch: Path) -> None:
    folder = fetched(tuned, "OLLAMA", scratch)
    modelfile = (folder / "Modelfile").read_text()
    assert (folder / modelfile.partition("\n")[0].removeprefix("FROM ")).read_bytes()[:4] == b"GGUF"
    assert "Input: {{ .Content }}\nOutput:" in modelfile
    assert "PARAMETER temperature 0\n" in modelfile
    assert 'PARAMETER stop "<eos>"\n' in modelfile
