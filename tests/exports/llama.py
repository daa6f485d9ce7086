"""What llama.cpp makes of a GGUF file, in a process of its own: JSON in, JSON out.

python llama.py MODEL < {"prompts": […], "count": 16, "texts": […], "messages": […]}
"""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Said:
    """What llama.cpp said.

    Attributes:
        answers: To the prompts, greedily, their special tokens parsed.
        tokens: Of the texts, nothing added and nothing parsed.
        prompt: The text that the chat template makes of the messages.
    """

    answers: list[str]
    tokens: list[list[int]]
    prompt: str


def ask(
    model: Path,
    prompts: Sequence[str] = (),
    count: int = 16,
    texts: Sequence[str] = (),
    messages: Sequence[dict[str, str]] = (),
) -> Said:
    """Load a GGUF file in llama.cpp and ask it."""
    asked = json.dumps({"prompts": [*prompts], "count": count, "texts": [*texts], "messages": [*messages]})
    command = [sys.executable, __file__, str(model)]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return Said(**json.loads(done.stdout.splitlines()[-1]))


def _serve(model: str) -> Any:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.n_parallel, parameters.n_ctx, parameters.n_gpu_layers = 1, 512, 0
    parameters.warmup, parameters.verbosity = False, -1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    # As exact as it can be: so what is the same comes out the same.
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(parameters)


def _post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def _main() -> None:
    asked = json.load(sys.stdin)
    server = _serve(sys.argv[1])
    url = server.listening_address
    said: dict[str, Any] = {"answers": [], "tokens": [], "prompt": ""}
    for prompt in asked["prompts"]:
        body = {"prompt": prompt, "n_predict": asked["count"], "temperature": 0, "cache_prompt": False}
        said["answers"].append(_post(f"{url}/completion", body)["content"])
    for text in asked["texts"]:
        said["tokens"].append(_post(f"{url}/tokenize", {"content": text, "parse_special": False})["tokens"])
    if asked["messages"]:
        said["prompt"] = _post(f"{url}/apply-template", {"messages": asked["messages"]})["prompt"]
    print(json.dumps(said))


if __name__ == "__main__":
    _main()
