"""Table of contents: the parts, and how they are put together. The only file that wires."""

import ipaddress
import logging
import os
import secrets
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tunesmith.auth.accounts import Accounts
from tunesmith.auth.api_keys import ApiKeys
from tunesmith.auth.clients import Clients
from tunesmith.auth.groups import Groups
from tunesmith.auth.projects import Projects
from tunesmith.auth.service_accounts import SelfSignedTokens, ServiceAccounts
from tunesmith.auth.signing_keys import SigningKeys
from tunesmith.auth.tokens import AccessTokens
from tunesmith.auth.verifiers import OwnTokens, TokenVerifier, Verifier
from tunesmith.base_models.catalog import Catalog
from tunesmith.config import NO_GRPC, Settings
from tunesmith.errors import Unavailable
from tunesmith.jobs.queue import JobQueue
from tunesmith.store.artifacts import ArtifactStore
from tunesmith.store.audit import Audit, administrator
from tunesmith.store.database import Database
from tunesmith.store.sweep import sweep

if TYPE_CHECKING:
    from starlette.routing import BaseRoute

    from tunesmith.api.dispatch import Dispatcher
    from tunesmith.base_models.catalog import BaseModel
    from tunesmith.engines.base import Engine
    from tunesmith.engines.metrics import EngineMetrics
    from tunesmith.engines.vllm_client import VllmClient
    from tunesmith.jobs.worker import Worker
    from tunesmith.safety.guard import Safety

FIRST_ACCOUNT = "admin@localhost"
KEEP_ALIVE_SECONDS = 75  # longer than clients keep an idle connection, or they meet one that closes
SHUTDOWN_SECONDS = 5  # for requests that are under way when the server stops

REFUSED_AT_ONCE = 16  # calls for which the engine has no room

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
    clients: Clients
    service_accounts: ServiceAccounts
    signing_keys: SigningKeys
    queue: JobQueue
    audit: Audit

    @classmethod
    def open(cls, settings: Settings) -> Self:
        """Open the data dir, making it when there is none."""
        settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        database = Database(settings.database, settings.database_wait_seconds)
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
            Clients(database),
            ServiceAccounts(database),
            SigningKeys(database),
            JobQueue(database, settings.lease_seconds),
            Audit(database),
        )


def dispatcher(parts: Parts, engine: "Engine") -> "Dispatcher":
    """Return what runs the calls of every transport: store -> auth -> services -> dispatch."""
    from tunesmith.api.dispatch import Dispatcher
    from tunesmith.api.limits import Limits
    from tunesmith.services.bulletin import Bulletin
    from tunesmith.services.creation import Creation
    from tunesmith.services.exports import Exports
    from tunesmith.services.generation import GenerativeService
    from tunesmith.services.models import ModelService
    from tunesmith.services.operations import Operations
    from tunesmith.services.permissions import PermissionService
    from tunesmith.services.reports import Reports
    from tunesmith.services.text import TextService
    from tunesmith.services.tuning import TuningService

    settings, database = parts.settings, parts.database
    creation = Creation(database, parts.catalog, settings.seed, settings.queued_jobs_per_account)
    bulletin = Bulletin(database, settings.watches_per_account)
    stored, most = (parts.artifacts, parts.catalog, settings.cache_dir), settings.exports_per_account
    exports = Exports(database, *stored, parts.audit, most)
    rated = safety(parts, engine)
    services = {
        f"{V1BETA}.ModelService": ModelService(database, parts.artifacts, parts.catalog, creation),
        f"{V1BETA}.PermissionService": PermissionService(database),
        f"{V1BETA}.GenerativeService": GenerativeService(
            database, engine, parts.catalog, settings.cache_dir, rated
        ),
        f"{V1BETA}.TextService": TextService(database, engine, parts.catalog, rated),
        "google.longrunning.Operations": Operations(database, parts.artifacts),
        "tunesmith.v1beta.TuningService": TuningService(
            database, creation, bulletin, Reports(database, engine, parts.catalog), exports
        ),
    }
    self_signed = SelfSignedTokens(parts.service_accounts, settings.public_url)
    tokens: list[TokenVerifier] = [OwnTokens(parts.tokens), self_signed]
    if settings.issuers:
        from tunesmith.auth.oidc import ExternalIssuers

        tokens.append(ExternalIssuers(settings.issuers, database))
    limits = Limits(settings.requests_per_minute, settings.generations_per_account)
    return Dispatcher(services, Verifier(parts.keys, *tokens), limits, parts.audit)


def engine_of(parts: Parts, metrics: "EngineMetrics") -> "Engine":
    """Return what answers."""
    from tunesmith.engines.torch_engine import TorchEngine

    settings = parts.settings
    if settings.engine == "vllm":
        return _vllm_engine(parts, metrics)
    return TorchEngine(
        parts.artifacts,
        settings.cache_dir,
        device=settings.device,
        max_batch=settings.max_batch,
        loaded_adapters=settings.loaded_adapters,
        kv_bytes=settings.kv_cache_mb << 20,
        waiting=settings.waiting_answers,
        waiting_seconds=settings.waiting_seconds,
        metrics=metrics,
    )


def vllm_base(settings: Settings, catalog: Catalog) -> "BaseModel":
    """Return the base model that the vLLM server has.

    Raises:
        ValueError: The catalog lacks it.
    """
    name = settings.vllm_base_model.removeprefix("models/")
    model = catalog.find(f"models/{name}") if name else catalog.default
    if model is None:
        raise ValueError(f"vllm_base_model: there is no {name} in the catalog; `tunesmith doctor` lists them")
    return model


def vllm_client(settings: Settings) -> "VllmClient":
    """Return what asks the vLLM server."""
    from tunesmith.engines.vllm_client import VllmClient

    key = settings.vllm_api_key.get_secret_value()
    return VllmClient(settings.vllm_url, key, settings.vllm_silence_seconds)


def _vllm_engine(parts: Parts, metrics: "EngineMetrics") -> "Engine":
    from tunesmith.engines.admission import Admission
    from tunesmith.engines.places import Places
    from tunesmith.engines.vllm_adapters import VllmAdapters
    from tunesmith.engines.vllm_engine import VllmEngine

    settings = parts.settings
    folder, client = settings.vllm_adapters, vllm_client(settings)
    seen_as = settings.vllm_adapters_path or str(folder)
    adapters = VllmAdapters(parts.artifacts, client, folder, seen_as, settings.loaded_adapters, metrics)
    model = vllm_base(settings, parts.catalog)
    admission = Admission(settings.waiting_answers, settings.waiting_seconds)
    places = Places(settings.vllm_max_seqs, admission, metrics, model.id)
    return VllmEngine(
        parts.artifacts, settings.cache_dir, client, model.id, settings.vllm_model, adapters, places, metrics
    )


def safety(parts: Parts, engine: "Engine") -> "Safety":
    """Return what rates prompts and answers.

    Raises:
        ValueError: The rater is a model that the catalog lacks.
    """
    from tunesmith.safety.guard import Safety
    from tunesmith.safety.lexicon import LexiconRater
    from tunesmith.safety.model_rater import ModelRater

    name, threshold = parts.settings.safety_rater, parts.settings.safety_threshold
    if name == "off":
        return Safety()
    if name == "lexicon":
        return Safety(LexiconRater(), threshold)
    model = parts.catalog.find(name)
    if model is None:
        raise ValueError(f"safety_rater: there is no {name} in the catalog; `tunesmith doctor` lists its models")
    return Safety(ModelRater(engine, model, parts.settings.safety_cuts), threshold)


def sign_in(parts: Parts) -> "list[BaseRoute]":
    """Return the routes of the OAuth server and of its pages."""
    from tunesmith.api.oauth_routes import oauth_routes, root_of
    from tunesmith.api.sign_in_routes import sign_in_routes
    from tunesmith.auth.attempts import Attempts
    from tunesmith.auth.authorizations import Authorizations
    from tunesmith.auth.device_codes import DeviceCodes
    from tunesmith.auth.oauth_server import OAuthServer
    from tunesmith.auth.sign_in import SignIn

    database, root, insecure = parts.database, root_of(parts.settings.public_url), parts.settings.insecure
    server = OAuthServer(
        parts.clients,
        Authorizations(database, parts.settings.access_token_seconds),
        DeviceCodes(database),
        parts.service_accounts,
        parts.tokens,
        parts.signing_keys,
        public_url=parts.settings.public_url,
        insecure=insecure,
    )
    attempts = Attempts(database)
    people = SignIn(database, parts.accounts, attempts)
    return [*oauth_routes(server, root), *sign_in_routes(server, people, attempts, root, insecure=insecure)]


def serve(settings: Settings, stop_with_stdin: bool = False) -> None:
    """Serve the API, with local workers, until SIGINT or SIGTERM."""
    import uvicorn

    from tunesmith.api.grpc_server import GrpcServer
    from tunesmith.api.http_protocol import http_protocol
    from tunesmith.api.metrics import CallMetrics
    from tunesmith.api.openai_routes import openai_routes
    from tunesmith.api.rest_server import rest_app
    from tunesmith.engines.metrics import EngineMetrics
    from tunesmith.jobs.launchers import LocalLauncher

    _refuse_plain_text(settings)
    tls = _tls(settings)
    listener = _listen(settings.host, settings.port)
    grpc = None
    if settings.grpc_port != NO_GRPC:
        largest = settings.max_body_bytes
        where = settings.host, settings.grpc_port
        grpc = GrpcServer(
            *where, max_message_bytes=largest, key_and_certificates=tls, generating=_generating(settings)
        )
    parts = Parts.open(settings)
    parts.keys.start()
    password_file = first_account(parts)
    sweep(parts.database, parts.artifacts)
    metrics = CallMetrics()
    engine = engine_of(parts, EngineMetrics(metrics.registry))
    calls, loaded = dispatcher(parts, engine), threading.Event()
    launcher = LocalLauncher(settings.workers, _worker_arguments(settings), parts.queue)
    launcher.start()

    def preload() -> None:
        with suppress(Unavailable):  # it stops already
            _preload(parts, engine)
            loaded.set()
            if grpc:
                grpc.ready()

    threading.Thread(target=preload, name="preload", daemon=True).start()
    # An issuer's keys may have to be fetched, and a database elsewhere to be waited for.
    quick = READS_OF_A_ROW if parts.database.in_process and not settings.issuers else ()
    if grpc:
        grpc.start(calls, metrics, quick)
    server = uvicorn.Server(
        uvicorn.Config(
            rest_app(
                calls,
                max_body_bytes=settings.max_body_bytes,
                receive_seconds=settings.receive_seconds,
                ready=loaded.is_set,
                metrics=metrics,
                routes=[
                    *sign_in(parts),
                    *openai_routes(
                        calls, metrics, settings.max_body_bytes, settings.receive_seconds, _generating(settings)
                    ),
                ],
                generating=_generating(settings),
                cors_origins=[origin.strip() for origin in settings.cors_origins.split(",")],
                inline=quick,
            ),
            http=http_protocol(settings.receive_seconds),
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
        )
    )
    # uvicorn raises the signal that ended it once more: by default SIGTERM would then end all this at once.
    signal.signal(signal.SIGTERM, lambda *_: setattr(server, "should_exit", True))
    if stop_with_stdin:
        on_end_of_stdin(lambda: setattr(server, "should_exit", True))
    host, port = listener.getsockname()[:2]
    scheme = "https" if tls else "http"
    print(f"Tunesmith serves {scheme}://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    print(f"  gRPC    {grpc.address}{' with TLS' if tls else ''}" if grpc else "  gRPC    off")
    print(f"  data    {settings.data_dir}")
    if password_file:
        print(f"  account {FIRST_ACCOUNT}; its password is in {password_file}")
    print(f"  token   tunesmith token {FIRST_ACCOUNT}", flush=True)
    try:
        server.run(sockets=[listener])
    finally:
        if grpc:
            grpc.stop(SHUTDOWN_SECONDS)
        launcher.stop()
        engine.close()
        parts.keys.stop()
        parts.audit.close()
        parts.database.close()


def work(settings: Settings, name: str, stop_with_stdin: bool) -> None:
    """Do jobs until SIGINT or SIGTERM; the job under way is then checkpointed and put back."""
    stop = threading.Event()
    worker: Worker | None = None

    def end() -> None:
        stop.set()
        if worker is None or worker.leaves():  # starting takes seconds, and another base model a minute
            os._exit(0)

    on_stop_signal(end)
    if stop_with_stdin:
        on_end_of_stdin(end)
    os.nice(settings.worker_nice)
    from tunesmith.jobs import worker as training

    parts = Parts.open(settings)
    worker = training.Worker(name, settings, parts.queue, parts.artifacts, parts.catalog)
    worker.prepare()
    worker.run(stop)
    parts.database.close()


def first_account(parts: Parts) -> Path | None:
    """On an empty database make an account; return the file that holds its password."""
    if parts.accounts.list():
        return None
    password = secrets.token_urlsafe(12)
    file = parts.settings.data_dir / "first-account.txt"
    file.touch(mode=0o600)
    file.write_text(f"{FIRST_ACCOUNT} {password}\n")
    with parts.audit.change(administrator(), "CreateAccount", f"accounts/{FIRST_ACCOUNT}"):
        parts.accounts.create(FIRST_ACCOUNT, password)
    return file


def on_stop_signal(act: Callable[[], object]) -> None:
    """Call `act` on a thread of its own when SIGINT or SIGTERM comes, at once.

    Python's own handlers run on the main thread: after what it computes, and in the middle of what it locks.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)

    def wait() -> None:
        os.read(reading, 1)
        act()

    threading.Thread(target=wait, name="signals", daemon=True).start()


def on_end_of_stdin(act: Callable[[], object]) -> None:
    """Call `act` when standard input ends: however the parent process ended, its end of the pipe is closed."""

    def wait() -> None:
        # Not through sys.stdin: its lock would be held when the interpreter ends, which then aborts.
        while os.read(sys.stdin.fileno(), 1024):
            pass
        act()

    threading.Thread(target=wait, name="stdin", daemon=True).start()


def _preload(parts: Parts, engine: "Engine") -> None:
    """Load the default base model before the first request needs it."""
    from tunesmith.base_models import weights

    if weights.find(parts.catalog.default, parts.settings.cache_dir):
        engine.preload(parts.catalog.default)


def _refuse_plain_text(settings: Settings) -> None:
    """Raise ValueError when passwords and tokens would pass other machines in the open."""
    if settings.ssl_certfile or settings.insecure:
        return
    host, any_of_ours = settings.host or None, socket.AI_PASSIVE
    found = socket.getaddrinfo(host, settings.port, type=socket.SOCK_STREAM, flags=any_of_ours)
    if not all(ipaddress.ip_address(str(address[0])).is_loopback for *_, address in found):
        raise ValueError(
            f"without TLS, what is sent to {settings.host} can be read on the way, passwords too: give "
            "--ssl-certfile and --ssl-keyfile (`tunesmith certificate` makes them to try it out), or say "
            "--insecure when something in front of Tunesmith does TLS"
        )


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


def _generating(settings: Settings) -> int:
    """Return how many calls for answers a transport runs: all that the engine takes, and those it refuses."""
    places = settings.vllm_max_seqs if settings.engine == "vllm" else settings.max_batch
    return places + settings.waiting_answers + REFUSED_AT_ONCE


def _worker_arguments(settings: Settings) -> list[str]:
    """Return the options that give a worker process this process's settings."""
    fields = ("data_dir", "cache_dir", "device", "threads", "log_level")
    return [item for name in fields for item in (f"--{name.replace('_', '-')}", str(getattr(settings, name)))]
