"""Requests a second and how long they take: what the API costs when the engine answers at once.

The server is one process, the load another: a bare asyncio client that keeps its connections, so that it is
the server that is measured. Both share the machine's cores. Run on an otherwise idle machine:
python benchmarks/api.py [SECONDS]
"""

import asyncio
import json
import multiprocessing
import os
import random
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import uvicorn

from tunesmith import app, protos
from tunesmith.api.rest_server import rest_app
from tunesmith.base_models.catalog import BaseModel
from tunesmith.base_models.prompts import Turn
from tunesmith.config import Settings
from tunesmith.engines.base import Chunk, Sampling
from tunesmith.store.tables import Job, TunedModel

MODELS = 1000
CONNECTIONS = (1, 32)
GOAL = "goal: get at 32 connections at least 1,500 requests/s, p99 under 40 ms, on 2 cores"


class Instant:
    """An engine that answers at once."""

    def generate(
        self,
        model: BaseModel,
        adapter: str | None,
        turns: Sequence[Turn],
        sampling: Sampling,
        gone: threading.Event,
    ) -> Iterator[Chunk]:
        """Yield one word."""
        yield Chunk("two", 7, 1, protos.Candidate.STOP)

    def count_tokens(self, model: BaseModel, adapter: str | None, turns: Sequence[Turn]) -> int:
        """Return a count."""
        return 7

    def embed(self, model: BaseModel, texts: Sequence[str], gone: threading.Event) -> list[list[float]]:
        """Return a vector for each text."""
        return [[1.0] for _ in texts]

    def preload(self, model: BaseModel) -> None:
        """There is nothing to load."""

    def close(self) -> None:
        """There is nothing to stop."""


@dataclass(frozen=True)
class Call:
    """One kind of request."""

    name: str
    method: str
    path: str
    body: bytes = b""

    def bytes(self, token: str) -> bytes:
        """Return the request as it goes over the wire."""
        head = f"{self.method} {self.path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\n"
        return f"{head}content-length: {len(self.body)}\r\n\r\n".encode() + self.body


CALLS = (
    Call("get", "GET", "/v1beta/tunedModels/model-7"),
    Call(f"list {MODELS:,}", "GET", f"/v1beta/tunedModels?pageSize={MODELS}"),
    Call("list 10", "GET", "/v1beta/tunedModels"),
    Call("create", "POST", "/v1beta/tunedModels", json.dumps({
        "displayName": "numbers",
        "baseModel": "models/gemini-1.0-pro-001",
        "tuningTask": {
            "trainingData": {
                "examples": {"examples": [{"textInput": str(n), "output": str(n + 1)} for n in range(15)]}
            }
        },
    }).encode()),
    Call("generate", "POST", "/v1beta/tunedModels/model-7:generateContent",
         b'{"contents": [{"parts": [{"text": "one"}]}]}'),
)  # fmt: skip


def serve(folder: str, parent: Connection) -> None:
    """Serve with an instant engine and no worker; tell the parent port and token."""
    settings = Settings.load(data_dir=Path(folder), workers=0)
    parts = app.Parts.open(settings)
    app.first_account(parts)
    token = parts.tokens.create(app.FIRST_ACCOUNT, [], seconds=3600)
    fill(parts)
    listener = socket.create_server(("127.0.0.1", 0))
    served = rest_app(
        app.dispatcher(parts, Instant()),
        max_body_bytes=settings.max_body_bytes,
        ready=lambda: True,
        inline=app.READS_OF_A_ROW,
    )
    parent.send((listener.getsockname()[1], token))
    uvicorn.Server(
        uvicorn.Config(served, log_config=None, access_log=False, lifespan="off", timeout_keep_alive=75)
    ).run(sockets=[listener])


def fill(parts: app.Parts) -> None:
    """Make the models that are listed; they are ACTIVE, so that they can be asked."""
    with parts.database.write() as session:
        for number in range(MODELS):
            model = protos.TunedModel(
                name=f"tunedModels/model-{number}",
                display_name=f"model {number}",
                base_model="models/gemini-1.0-pro-001",
                state=protos.TunedModel.ACTIVE,
                temperature=0,
                top_p=0.95,
                top_k=64,
            )
            model.create_time.GetCurrentTime()
            model.update_time.CopyFrom(model.create_time)
            for step in range(1, 20):  # as many as the tutorial's tuning makes
                model.tuning_task.snapshots.add(
                    step=step,
                    epoch=1 + step // 4,
                    mean_loss=random.uniform(0.1, 3),
                    compute_time=model.create_time,
                )
            session.add(
                TunedModel(
                    id=f"model-{number}",
                    owner=app.FIRST_ACCOUNT,
                    base=parts.catalog.default.id,
                    message=model.SerializeToString(),
                    state=model.state,
                    create_time=time.time() + number / 1e6,
                    adapter="adapters/none",
                )
            )
            session.flush()
            session.add(
                Job(
                    id=f"job-{number}",
                    tuned_model=f"model-{number}",
                    state="done",
                    training_data=b"",
                    seed=0,
                    total_steps=19,
                    create_time=time.time(),
                )
            )


async def load(port: int, request: bytes, connections: int, seconds: float) -> tuple[float, list[float]]:
    """Send a request again and again over each connection; return requests a second and their durations."""
    durations: list[float] = []
    ends = asyncio.get_running_loop().time() + seconds

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
        while (began := time.perf_counter()) and asyncio.get_running_loop().time() < ends:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200 "):
                raise SystemExit((head + await reader.read(2000)).decode())
            length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
            await reader.readexactly(int(length))
            durations.append(time.perf_counter() - began)
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(connections)))
    return len(durations) / (time.perf_counter() - began), sorted(durations)


def cpu_seconds(process: int) -> float:
    """Return the processor time that a process has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main(seconds: float) -> None:
    """Print a row for each call and number of connections."""
    ours, theirs = multiprocessing.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        server = multiprocessing.get_context("spawn").Process(target=serve, args=(folder, theirs))
        server.start()
        try:
            port, token = ours.recv()
            measure(port, token, seconds, server.pid or 0)
        finally:
            server.terminate()
            server.join()


def measure(port: int, token: str, seconds: float, process: int) -> None:
    """Measure every call."""
    print(f"{'REST':<12}{'connections':>12}{'requests/s':>12}{'p50 ms':>9}{'p99 ms':>9}{'server CPU ms':>15}")
    for call in CALLS:
        for connections in CONNECTIONS:
            request = call.bytes(token)
            asyncio.run(load(port, request, connections, 0.3))  # warm up
            before = cpu_seconds(process)
            rate, durations = asyncio.run(load(port, request, connections, seconds))
            cpu = 1000 * (cpu_seconds(process) - before) / len(durations)
            p50, p99 = (1000 * durations[int(len(durations) * part)] for part in (0.5, 0.99))
            print(f"{call.name:<12}{connections:>12}{rate:>12,.0f}{p50:>9.2f}{p99:>9.2f}{cpu:>15.2f}", flush=True)
    print(GOAL)


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 5)
