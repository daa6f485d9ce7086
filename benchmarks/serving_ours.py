"""Our side of the serving benchmark: one job through the engine as the server uses it, or through a server.

serving.py runs it, in a process of its own: python serving_ours.py (engine|undrafted|http) JOB RESULT
"""

import http.client
import json
import multiprocessing
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import uvicorn

from serving_job import WARM_UP, Answer, Ask, Job, Result, ask_all
from serving_weights import ENDLESS, adapter_path, base_weights, endless
from training_job import peak_bytes
from tunesmith import app, protos
from tunesmith.api.rest_server import rest_app
from tunesmith.auth.tokens import DEFAULT_SCOPES
from tunesmith.base_models.prompts import Turn
from tunesmith.config import Settings
from tunesmith.engines.base import Sampling
from tunesmith.engines.torch_engine import TorchEngine
from tunesmith.store.artifacts import ArtifactStore
from tunesmith.store.tables import TunedModel


@contextmanager
def started(job: Job, *, drafts: bool = True) -> Iterator[TorchEngine]:
    """The engine, with the settings of a server that nobody has changed."""
    torch.set_num_threads(job.threads)
    settings = Settings.load()
    base = base_weights(settings)
    endless(base)
    engine = TorchEngine(
        ArtifactStore(job.artifacts),
        settings.cache_dir,
        device="cpu",
        max_batch=settings.max_batch,
        loaded_adapters=settings.loaded_adapters,
        drafts=drafts,
    )
    try:
        engine.preload(base.model)
        yield engine
    finally:
        engine.close()


def through_engine(job: Job, *, drafts: bool = True) -> tuple[list[Answer], int]:
    """Answer in this process; return the answers and the peak memory in bytes."""
    model = base_weights(Settings.load()).model
    with started(job, drafts=drafts) as engine:

        def asked(ask: Ask, outputs: int) -> Iterator[tuple[int, str]]:
            path = adapter_path(ask.adapter, ENDLESS)
            sampling = Sampling(temperature=0.0, top_p=1.0, top_k=1, max_output_tokens=outputs)
            for chunk in engine.generate(model, path, [Turn("user", ask.text)], sampling, threading.Event()):
                yield chunk.output_tokens, chunk.text

        for burst in job.warm:
            ask_all(burst, lambda ask: asked(ask, WARM_UP))
        return ask_all(job.asks, lambda ask: asked(ask, job.outputs)), peak_bytes()


def through_server(job: Job) -> tuple[list[Answer], int]:
    """Answer as a client of a server in another process; return the answers and the server's peak memory."""
    ours, theirs = multiprocessing.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        server = multiprocessing.get_context("spawn").Process(target=serve, args=(job, folder, theirs))
        server.start()
        try:
            port, token = ours.recv()
            for burst in job.warm:
                ask_all(burst, lambda ask: streamed(port, token, ask, WARM_UP))
            answers = ask_all(job.asks, lambda ask: streamed(port, token, ask, job.outputs))
            return answers, peak_bytes(server.pid or 0)
        finally:
            server.terminate()
            server.join()


def streamed(port: int, token: str, ask: Ask, outputs: int) -> Iterator[tuple[int, str]]:
    """Ask one question over HTTP; yield the text as it comes."""
    body = {
        "contents": [{"parts": [{"text": ask.text}]}],
        "generationConfig": {"temperature": 0, "maxOutputTokens": outputs},
    }
    connection = http.client.HTTPConnection("127.0.0.1", port)
    path = f"/v1beta/tunedModels/tuned-{ask.adapter}:streamGenerateContent?alt=sse"
    connection.request("POST", path, json.dumps(body), {"authorization": f"Bearer {token}"})
    with connection.getresponse() as response:
        if response.status != http.client.OK:
            raise SystemExit(f"the server answered {response.status}: {response.read().decode()}")
        for line in response:
            if line.startswith(b"data: "):
                event = json.loads(line[6:])
                parts = event["candidates"][0].get("content", {}).get("parts", [])
                text = "".join(part.get("text", "") for part in parts)
                yield event["usageMetadata"].get("candidatesTokenCount", 0), text
    connection.close()


def serve(job: Job, folder: str, parent: Connection) -> None:
    """Serve the job's adapters as tuned models; tell the parent port and token."""
    settings = Settings.load(data_dir=Path(folder), workers=0)
    parts = app.Parts.open(settings)
    app.first_account(parts)
    token = parts.tokens.create(app.FIRST_ACCOUNT, DEFAULT_SCOPES, seconds=3600)
    add_models(parts, len(job.adapters))
    listener = socket.create_server(("127.0.0.1", 0))
    with started(job) as engine:
        served = rest_app(
            app.dispatcher(parts, engine),
            max_body_bytes=settings.max_body_bytes,
            ready=lambda: True,
            inline=app.READS_OF_A_ROW,
        )
        parent.send((listener.getsockname()[1], token))
        uvicorn.Server(uvicorn.Config(served, log_config=None, access_log=False, lifespan="off")).run(
            sockets=[listener]
        )


def add_models(parts: app.Parts, count: int) -> None:
    """Make ACTIVE models of the adapters."""
    with parts.database.write() as session:
        for number in range(count):
            message = protos.TunedModel(
                name=f"tunedModels/tuned-{number}",
                base_model=f"models/{parts.catalog.default.id}",
                state=protos.TunedModel.ACTIVE,
                temperature=0,
                top_p=0.95,
                top_k=64,
            )
            session.add(
                TunedModel(
                    id=f"tuned-{number}",
                    owner=app.FIRST_ACCOUNT,
                    base=parts.catalog.default.id,
                    message=message.SerializeToString(),
                    state=message.state,
                    create_time=time.time(),
                    adapter=adapter_path(number, ENDLESS),
                )
            )


SIDES = {"engine": through_engine, "undrafted": partial(through_engine, drafts=False), "http": through_server}


def main(side: str, job: Job) -> Result:
    """Answer as the job says."""
    answers, peak = SIDES[side](job)
    return Result(answers, peak, {"torch": version("torch")})


if __name__ == "__main__":
    main(sys.argv[1], Job.read(Path(sys.argv[2]))).write(Path(sys.argv[3]))
