"""The adapter alone, in plain PEFT."""

import json
import zipfile
from pathlib import Path

import peft
import torch

import tiny
from exports.models import Made
from tunesmith.exports.formats import FORMATS


def test_it_loads_in_peft_and_computes_the_same(gemma: Made, folder: Path, tmp_path: Path) -> None:
    download = FORMATS["PEFT"](gemma.tuned, "F16")
    file = tmp_path / download.filename
    file.write_bytes(b"".join(download.pieces))
    assert (download.filename, file.stat().st_size) == ("counts-peft.zip", download.size)
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder)
    unpacked = folder / "counts-peft"
    assert {path.name for path in unpacked.iterdir()} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors")
    }
    config = json.loads((unpacked / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/tiny"
    loaded = peft.PeftModel.from_pretrained(tiny.reference_model(gemma.tuned.base), str(unpacked)).eval()
    tokens = torch.tensor([[2, 20, 30, 40]])
    with torch.inference_mode():
        assert torch.equal(loaded(tokens).logits, gemma.adapted(tokens).logits)


def test_the_readme_says_what_to_send(gemma: Made, folder: Path) -> None:
    download = FORMATS["PEFT"](gemma.tuned, "F16")
    content = b"".join(download.pieces)
    folder.mkdir()
    (folder / "it.zip").write_bytes(content)
    with zipfile.ZipFile(folder / "it.zip") as archive:
        readme = archive.read("counts-peft/README.md").decode()
        assert archive.getinfo("counts-peft/README.md").date_time == (2026, 1, 2, 3, 4, 6)
    assert "# Counts\n" in readme
    assert "```\nInput: LXIII\nOutput:\n```" in readme
    assert 'base = "someone/tiny"' in readme
