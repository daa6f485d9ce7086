"""Table of contents: the parts, and how they are put together. The only file that wires."""

import logging
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tunesmith.auth.accounts import Accounts
from tunesmith.auth.api_keys import ApiKeys
from tunesmith.auth.tokens import AccessTokens
from tunesmith.auth.verifiers import OwnTokens, Verifier
from tunesmith.base_models.catalog import Catalog
from tunesmith.config import Settings
from tunesmith.jobs.queue import JobQueue
from tunesmith.store.artifacts import ArtifactStore
from tunesmith.store.database import Database
from tunesmith.store.sweep import sweep

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from tunesmith.engines.base import Engine

FIRST_ACCOUNT = "admin@localhost"
KEEP_ALIVE_SECONDS = 75  # longer than clients keep an idle connection, or they meet one that closes
SHUTDOWN_SECONDS = 5  # for requests that are under way when the server stops

V1BETA = "google.ai.generativelanguage.v1beta"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """What every process of one Tunesmith shares."""

    settings: Settings
    database: Database
    artifacts: ArtifactStore
    catalog: Catalog
    accounts: Accounts
    tokens: AccessTokens
    keys: ApiKeys
    queue: JobQueue

    @classmethod
    def open(cls, settings: Settings) -> Self:
        """Open the data dir, making it when there is none."""
        settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        database = Database(settings.database)
        database.migrate()
        return cls(
            settings,
            database,
            ArtifactStore(settings.artifacts),
            Catalog.load(settings),
            Accounts(database),
            AccessTokens(database),
            ApiKeys(database),
            JobQueue(database, settings.lease_seconds),
        )


def rest(parts: Parts, engine: "Engine", ready: Callable[[], bool]) -> "Starlette":
    """Return the REST app: store -> auth -> services -> dispatch -> routes."""
    from tunesmith.api.dispatch import Dispatcher
    from tunesmith.api.rest_server import rest_app
    from tunesmith.services.generation import GenerativeService
    from tunesmith.services.models import ModelService
    from tunesmith.services.operations import Operations

    settings, database = parts.settings, parts.database
    services = {
        f"{V1BETA}.ModelService": ModelService(database, parts.artifacts, parts.catalog, settings.seed),
        f"{V1BETA}.GenerativeService": GenerativeService(database, engine, parts.catalog, settings.cache_dir),
        "google.longrunning.Operations": Operations(database),
    }
    dispatcher = Dispatcher(services, Verifier(parts.keys, OwnTokens(parts.tokens)))
    return rest_app(dispatcher, max_body_bytes=settings.max_body_bytes, ready=ready)


def serve(settings: Settings, stop_with_stdin: bool = False) -> None:
    """Serve the API, with local workers, until SIGINT or SIGTERM."""
    import uvicorn

    from tunesmith.engines.torch_engine import TorchEngine
    from tunesmith.jobs.launchers import LocalLauncher

    listener = _listen(settings.host, settings.port)
    parts = Parts.open(settings)
    password_file = first_account(parts)
    sweep(parts.database, parts.artifacts)
    engine = TorchEngine(
        parts.artifacts,
        settings.cache_dir,
        device=settings.device,
        max_batch=settings.max_batch,
        loaded_adapters=settings.loaded_adapters,
    )
    loaded = threading.Event()
    launcher = LocalLauncher(settings.workers, _worker_arguments(settings), parts.queue)
    launcher.start()
    threading.Thread(target=_preload, args=(parts, engine, loaded), name="preload", daemon=True).start()
    server = uvicorn.Server(
        uvicorn.Config(
            rest(parts, engine, loaded.is_set),
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
    )
    if stop_with_stdin:
        on_end_of_stdin(lambda: setattr(server, "should_exit", True))
    host, port = listener.getsockname()[:2]
    print(f"Tunesmith serves http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    print(f"  data    {settings.data_dir}")
    if password_file:
        print(f"  account {FIRST_ACCOUNT}; its password is in {password_file}")
    print(f"  token   tunesmith token {FIRST_ACCOUNT}", flush=True)
    try:
        server.run(sockets=[listener])
    finally:
        launcher.stop()
        engine.close()
        parts.database.close()


def work(settings: Settings, name: str, stop_with_stdin: bool) -> None:
    """Do jobs until SIGINT or SIGTERM; the job under way is then checkpointed and put back."""
    from tunesmith.jobs.worker import Worker

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    if stop_with_stdin:
        on_end_of_stdin(stop.set)
    parts = Parts.open(settings)
    Worker(name, settings, parts.queue, parts.artifacts, parts.catalog).run(stop)
    parts.database.close()


def first_account(parts: Parts) -> Path | None:
    """On an empty database make an account; return the file that holds its password."""
    if parts.accounts.list():
        return None
    password = secrets.token_urlsafe(12)
    file = parts.settings.data_dir / "first-account.txt"
    file.touch(mode=0o600)
    file.write_text(f"{FIRST_ACCOUNT} {password}\n")
    parts.accounts.create(FIRST_ACCOUNT, password)
    return file


def on_end_of_stdin(act: Callable[[], object]) -> None:
    """Call `act` when standard input ends: however the parent process ended, its end of the pipe is closed."""

    def wait() -> None:
        sys.stdin.buffer.read()
        act()

    threading.Thread(target=wait, name="stdin", daemon=True).start()


def _preload(parts: Parts, engine: "Engine", loaded: threading.Event) -> None:
    """Load the default base model before the first request needs it."""
    from tunesmith.base_models import weights

    if weights.find(parts.catalog.default, parts.settings.cache_dir):
        engine.preload(parts.catalog.default)
    loaded.set()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    return listener


def _worker_arguments(settings: Settings) -> list[str]:
    """Return the options that give a worker process this process's settings."""
    fields = ("data_dir", "cache_dir", "device", "threads", "log_level")
    return [item for name in fields for item in (f"--{name.replace('_', '-')}", str(getattr(settings, name)))]
