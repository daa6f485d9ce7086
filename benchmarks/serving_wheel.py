"""llama.cpp's own server, from the prebuilt `xllamacpp` wheel: one job, in a process of its own.

serving.py runs it: python serving_wheel.py JOB RESULT
"""

import json
import sys
import urllib.request
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xllamacpp

from serving_job import WARM_UP, Ask, Job, Result, Tokens, ask_all
from training_job import peak_bytes


def serve(job: Job) -> Any:
    """Start the server, with a place for each stream."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = job.gguf
    parameters.n_parallel, parameters.n_gpu_layers = len(job.asks), 0
    parameters.n_ctx = len(job.asks) * (-(-job.longest // 256) * 256)
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = job.threads
    parameters.verbosity = -1
    return xllamacpp.Server(parameters)


def asked(url: str, ask: Ask, outputs: int) -> Iterator[tuple[int, Tokens]]:
    """Ask one question; yield the tokens as they come."""
    body = {
        "prompt": ask.prompt,
        "n_predict": outputs,
        "samplers": ["top_k"],  # with k = 1 nothing is cheaper
        "top_k": 1,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
        "stream": True,
        "return_tokens": True,
    }
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{url}/completion", json.dumps(body).encode(), headers)
    tokens = 0
    with urllib.request.urlopen(request) as response:
        for line in response:
            if line.startswith(b"data: ") and (new := json.loads(line[6:]).get("tokens")):
                tokens += len(new)
                yield tokens, new


def main(job: Job) -> Result:
    """Answer as the job says."""
    server = serve(job)
    url = server.listening_address
    for burst in job.warm:
        ask_all(burst, lambda ask: asked(url, ask, WARM_UP))
    answers = ask_all(job.asks, lambda ask: asked(url, ask, job.outputs))
    return Result(answers, peak_bytes(), {"xllamacpp": version("xllamacpp")})


if __name__ == "__main__":
    main(Job.read(Path(sys.argv[1]))).write(Path(sys.argv[2]))
