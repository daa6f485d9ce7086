"""Table of contents: the parts, and how they are put together. The only file that wires."""

import logging
import secrets
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tunesmith.auth.accounts import Accounts
from tunesmith.auth.api_keys import ApiKeys
from tunesmith.auth.groups import Groups
from tunesmith.auth.projects import Projects
from tunesmith.auth.tokens import AccessTokens
from tunesmith.auth.verifiers import OwnTokens, Verifier
from tunesmith.base_models.catalog import Catalog
from tunesmith.config import Settings
from tunesmith.jobs.queue import JobQueue
from tunesmith.store.artifacts import ArtifactStore
from tunesmith.store.database import Database
from tunesmith.store.sweep import sweep

if TYPE_CHECKING:
    from tunesmith.api.dispatch import Dispatcher
    from tunesmith.engines.base import Engine

FIRST_ACCOUNT = "admin@localhost"
KEEP_ALIVE_SECONDS = 75  # longer than clients keep an idle connection, or they meet one that closes
SHUTDOWN_SECONDS = 5  # for requests that are under way when the server stops

V1BETA = "google.ai.generativelanguage.v1beta"
READS_OF_A_ROW = (
    f"{V1BETA}.ModelService.GetModel",
    f"{V1BETA}.ModelService.GetTunedModel",
    f"{V1BETA}.PermissionService.GetPermission",
    "google.longrunning.Operations.GetOperation",
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """What every process of one Tunesmith shares."""

    settings: Settings
    database: Database
    artifacts: ArtifactStore
    catalog: Catalog
    accounts: Accounts
    groups: Groups
    projects: Projects
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
            Groups(database),
            Projects(database),
            AccessTokens(database),
            ApiKeys(database),
            JobQueue(database, settings.lease_seconds),
        )


def dispatcher(parts: Parts, engine: "Engine") -> "Dispatcher":
    """Return what runs the calls of every transport: store -> auth -> services -> dispatch."""
    from tunesmith.api.dispatch import Dispatcher
    from tunesmith.services.generation import GenerativeService
    from tunesmith.services.models import ModelService
    from tunesmith.services.operations import Operations
    from tunesmith.services.permissions import PermissionService
    from tunesmith.services.text import TextService

    settings, database = parts.settings, parts.database
    services = {
        f"{V1BETA}.ModelService": ModelService(database, parts.artifacts, parts.catalog, settings.seed),
        f"{V1BETA}.PermissionService": PermissionService(database),
        f"{V1BETA}.GenerativeService": GenerativeService(database, engine, parts.catalog, settings.cache_dir),
        f"{V1BETA}.TextService": TextService(database, engine, parts.catalog),
        "google.longrunning.Operations": Operations(database),
    }
    return Dispatcher(services, Verifier(parts.keys, OwnTokens(parts.tokens)))


def serve(settings: Settings, stop_with_stdin: bool = False) -> None:
    """Serve the API, with local workers, until SIGINT or SIGTERM."""
    import uvicorn

    from tunesmith.api.grpc_server import GrpcServer
    from tunesmith.api.metrics import CallMetrics
    from tunesmith.api.rest_server import rest_app
    from tunesmith.engines.torch_engine import TorchEngine
    from tunesmith.jobs.launchers import LocalLauncher

    tls = _tls(settings)
    listener = _listen(settings.host, settings.port)
    grpc = GrpcServer(
        settings.host,
        settings.grpc_port,
        max_message_bytes=settings.max_body_bytes,
        key_and_certificates=tls,
    )
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
    calls, metrics, loaded = dispatcher(parts, engine), CallMetrics(), threading.Event()
    launcher = LocalLauncher(settings.workers, _worker_arguments(settings), parts.queue)
    launcher.start()

    def preload() -> None:
        _preload(parts, engine)
        loaded.set()
        grpc.ready()

    threading.Thread(target=preload, name="preload", daemon=True).start()
    grpc.start(calls, metrics)
    server = uvicorn.Server(
        uvicorn.Config(
            rest_app(
                calls,
                max_body_bytes=settings.max_body_bytes,
                ready=loaded.is_set,
                metrics=metrics,
                cors_origins=[origin.strip() for origin in settings.cors_origins.split(",")],
                inline=READS_OF_A_ROW if parts.database.in_process else (),
            ),
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
        )
    )
    if stop_with_stdin:
        on_end_of_stdin(lambda: setattr(server, "should_exit", True))
    host, port = listener.getsockname()[:2]
    scheme = "https" if tls else "http"
    print(f"Tunesmith serves {scheme}://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    print(f"  gRPC    {grpc.address}{' with TLS' if tls else ''}")
    print(f"  data    {settings.data_dir}")
    if password_file:
        print(f"  account {FIRST_ACCOUNT}; its password is in {password_file}")
    print(f"  token   tunesmith token {FIRST_ACCOUNT}", flush=True)
    try:
        server.run(sockets=[listener])
    finally:
        grpc.stop(SHUTDOWN_SECONDS)
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


def _preload(parts: Parts, engine: "Engine") -> None:
    """Load the default base model before the first request needs it."""
    from tunesmith.base_models import weights

    if weights.find(parts.catalog.default, parts.settings.cache_dir):
        engine.preload(parts.catalog.default)


def _tls(settings: Settings) -> tuple[bytes, bytes] | None:
    """Return the key and the certificates to serve with; None to serve without TLS.

    Raises:
        OSError: The files cannot be read, or do not belong together.
    """
    certificate, key = settings.ssl_certfile, settings.ssl_keyfile
    if certificate is None or key is None:
        return None
    private, public = key.read_bytes(), certificate.read_bytes()
    try:
        # With a password at hand, so that an encrypted key is refused instead of asked about.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except ssl.SSLError as error:
        raise OSError(
            f"{certificate} and {key} are not a certificate in PEM and its unencrypted key: {error}"
        ) from error
    return private, public


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listener


def _worker_arguments(settings: Settings) -> list[str]:
    """Return the options that give a worker process this process's settings."""
    fields = ("data_dir", "cache_dir", "device", "threads", "log_level")
    return [item for name in fields for item in (f"--{name.replace('_', '-')}", str(getattr(settings, name)))]
