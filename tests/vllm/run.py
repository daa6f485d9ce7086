"""Starts a real vLLM server on a tiny model and runs the engine's tests on it: run.py PYTHON [pytest's options].

PYTHON is that of an environment with vLLM. What the server answers is kept in tests/engines/vllm_answers: the
ordinary suite replays it.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx2

TESTS = Path(__file__).parent.parent
sys.path.insert(0, str(TESTS))

from engines.vllm_model import LONGEST, vllm_weights  # noqa: E402

START_SECONDS = 900
ENVIRONMENT = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_HOST_IP": "127.0.0.1",  # or it offers its queue to the network
    "TORCHDYNAMO_DISABLE": "1",  # to compile takes longer than all that is computed here
}


def main(python: str, *options: str) -> int:
    """Return pytest's exit code."""
    with tempfile.TemporaryDirectory() as scratch, Path(scratch, "log").open("w+") as log:
        _, weights = vllm_weights(Path(scratch))
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(weights.path)]
        command += ["--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port)]
        command += [
            "--dtype",
            "float32",
            "--enforce-eager",
            "--max-model-len",
            str(LONGEST),
            "--max-num-seqs",
            "8",
        ]
        command += [
            "--max-num-seqs",
            "8",
            "--enable-lora",
            "--max-lora-rank",
            "16",
            "--max-loras",
            "2",
            "--max-cpu-loras",
            "4",
        ]
        command += ["--structured-outputs-config", '{"backend": "guidance"}']
        server = subprocess.Popen(command, env=os.environ | ENVIRONMENT, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            wait(url, server, log.name)
            tests = [str(TESTS / "engines" / "test_vllm_engine.py"), str(TESTS / "vllm")]
            pytest = [sys.executable, "-m", "pytest", *(options or tests)]
            return subprocess.run(pytest, env=os.environ | {"TUNESMITH_TEST_VLLM": url}, check=False).returncode
        finally:
            server.terminate()
            server.wait()


def wait(url: str, server: "subprocess.Popen[bytes]", log: str) -> None:
    """Return when the server answers."""
    until = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < until:
        try:
            if httpx2.get(f"{url}/health", timeout=5).is_success:
                return
        except httpx2.TransportError:
            time.sleep(1)
    raise SystemExit(f"vLLM did not start:\n{Path(log).read_text('utf-8')[-4000:]}")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
