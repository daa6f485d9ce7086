"""Requests a second and how long they take: what the API costs when the engine answers at once.

The server is one process, the load another: for REST a bare asyncio client that keeps its connections, so that it
is the server that is measured; for gRPC Google's own library, which takes a good part of a core itself. Both share
the machine's cores. Run on an otherwise idle machine: python benchmarks/api.py [SECONDS]
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
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import grpc.aio
import uvicorn
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message

from tunesmith import app, protos
from tunesmith.api.grpc_server import GrpcServer
from tunesmith.api.rest_server import rest_app
from tunesmith.auth.tokens import DEFAULT_SCOPES
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
        caller: str = "",
    ) -> Iterator[Chunk]:
        """Yield one word."""
        yield Chunk("two", 7, 1, protos.Candidate.STOP)

    def count_tokens(self, model: BaseModel, adapter: str | None, turns: Sequence[Turn]) -> int:
        """Return a count."""
        return 7

    def embed(
        self, model: BaseModel, texts: Sequence[str], gone: threading.Event, caller: str = ""
    ) -> list[list[float]]:
        """Return a vector for each text."""
        return [[1.0] for _ in texts]

    def preload(self, model: BaseModel) -> None:
        """There is nothing to load."""

    def close(self) -> None:
        """There is nothing to stop."""


@dataclass(frozen=True)
class Call:
    """One kind of request, over REST and over gRPC."""

    name: str
    http: str
    rpc: str
    request: Message
    body: bytes = b""

    def bytes(self, token: str) -> bytes:
        """Return the HTTP request as it goes over the wire."""
        head = f"{self.http} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\n"
        return f"{head}content-length: {len(self.body)}\r\n\r\n".encode() + self.body


NAME = "tunedModels/model-7"
MODELS_SERVICE = f"/{app.V1BETA}.ModelService"
EXAMPLES = {"examples": [{"textInput": str(n), "output": str(n + 1)} for n in range(15)]}
CREATED = {
    "displayName": "numbers",
    "baseModel": "models/gemini-1.0-pro-001",
    "tuningTask": {"trainingData": {"examples": EXAMPLES}},
}
ASKED = {"contents": [{"parts": [{"text": "one"}]}]}
CALLS = (
    Call(
        "get",
        f"GET /v1beta/{NAME}",
        f"{MODELS_SERVICE}/GetTunedModel",
        protos.GetTunedModelRequest(name=NAME),
    ),
    Call(
        f"list {MODELS:,}",
        f"GET /v1beta/tunedModels?pageSize={MODELS}",
        f"{MODELS_SERVICE}/ListTunedModels",
        protos.ListTunedModelsRequest(page_size=MODELS),
    ),
    Call(
        "list 10",
        "GET /v1beta/tunedModels",
        f"{MODELS_SERVICE}/ListTunedModels",
        protos.ListTunedModelsRequest(),
    ),
    Call(
        "create",
        "POST /v1beta/tunedModels",
        f"{MODELS_SERVICE}/CreateTunedModel",
        ParseDict({"tunedModel": CREATED}, protos.CreateTunedModelRequest()),
        json.dumps(CREATED).encode(),
    ),
    Call(
        "generate",
        f"POST /v1beta/{NAME}:generateContent",
        f"/{app.V1BETA}.GenerativeService/GenerateContent",
        ParseDict({"model": NAME, **ASKED}, protos.GenerateContentRequest()),
        json.dumps(ASKED).encode(),
    ),
)


def serve(folder: str, parent: Connection) -> None:
    """Serve with an instant engine and no worker; tell the parent port and token."""
    settings = Settings.load(data_dir=Path(folder), workers=0, queued_jobs_per_account=0)
    parts = app.Parts.open(settings)
    app.first_account(parts)
    token = parts.tokens.create(app.FIRST_ACCOUNT, DEFAULT_SCOPES, seconds=3600)
    fill(parts)
    listener = socket.create_server(("127.0.0.1", 0))
    calls = app.dispatcher(parts, Instant())
    grpc_server = GrpcServer("127.0.0.1", 0, max_message_bytes=settings.max_body_bytes)
    grpc_server.start(calls, quick=app.READS_OF_A_ROW)
    served = rest_app(
        calls,
        max_body_bytes=settings.max_body_bytes,
        ready=lambda: True,
        inline=app.READS_OF_A_ROW,
    )
    parent.send((listener.getsockname()[1], grpc_server.address, token))
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


async def rest(port: int, call: Call, token: str, until: float, durations: list[float]) -> None:
    """Send a request again and again over one connection."""
    request = call.bytes(token)
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    while (began := time.perf_counter()) < until:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200 "):
            raise SystemExit((head + await reader.read(2000)).decode())
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        await reader.readexactly(int(length))
        durations.append(time.perf_counter() - began)
    writer.close()


async def grpc_(address: str, call: Call, token: str, until: float, durations: list[float]) -> None:
    """Send a request again and again over one channel, as each client has its own."""
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1))
    request, metadata = call.request.SerializeToString(), (("authorization", f"Bearer {token}"),)
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        ask = channel.unary_unary(call.rpc)
        while (began := time.perf_counter()) < until:
            await ask(request, metadata=metadata)
            durations.append(time.perf_counter() - began)


Client = Callable[[float, list[float]], Awaitable[None]]


async def load(client: Client, connections: int, seconds: float) -> tuple[float, list[float]]:
    """Run so many clients for so long; return requests a second and how long each took."""
    durations: list[float] = []
    began = time.perf_counter()
    await asyncio.gather(*(client(began + seconds, durations) for _ in range(connections)))
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
            port, address, token = ours.recv()
            for transport, one, where in (("REST", rest, port), ("gRPC", grpc_, address)):
                columns = f"{'connections':>12}{'requests/s':>12}{'p50 ms':>9}{'p99 ms':>9}{'server CPU ms':>15}"
                print(f"{transport:<12}{columns}")
                for call in CALLS:
                    measure(call.name, partial(one, where, call, token), seconds, server.pid or 0)
            print(GOAL)
        finally:
            server.terminate()
            server.join()


def measure(name: str, client: Client, seconds: float, process: int) -> None:
    """Print a row for each number of connections."""
    for connections in CONNECTIONS:
        asyncio.run(load(client, connections, 0.3))  # warm up
        before = cpu_seconds(process)
        rate, durations = asyncio.run(load(client, connections, seconds))
        cpu = 1000 * (cpu_seconds(process) - before) / len(durations)
        p50, p99 = (1000 * durations[int(len(durations) * part)] for part in (0.5, 0.99))
        print(f"{name:<12}{connections:>12}{rate:>12,.0f}{p50:>9.2f}{p99:>9.2f}{cpu:>15.2f}", flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 5)
