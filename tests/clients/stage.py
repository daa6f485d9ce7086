"""What the clients meet: two live servers on one data dir, accounts for them, and a shelf of tuned models."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from clients import Client

sys.path.insert(0, str(Path(__file__).parents[1]))

from servers import EXAMPLES, TIMEOUT, Server, job, tiny_catalog
from tunesmith.app import Parts
from tunesmith.certificates import Issued, issue
from tunesmith.config import Settings

SHELF = 25  # models: more than two pages of the default size
BASE = "tiny-gemma3"
ALIASES = {"gemini-1.5-flash-001-tuning": BASE}  # or that name means the real weights
SHELF_OWNER, FRIEND, STRANGER = "shelf@localhost", "friend@localhost", "stranger@localhost"
SCOPES = (
    "https://www.googleapis.com/auth/cloud-platform",
    "https://www.googleapis.com/auth/generative-language.tuning",
)


@dataclass(frozen=True)
class Stage:
    """Running servers.

    Attributes:
        url: Where REST is served, in the clear.
        grpc: Host and port of gRPC over TLS, or "" while this server has none.
        authority: The certificate that a TLS client has to trust.
    """

    url: str
    grpc: str
    authority: Path
    parts: Parts
    shared: dict[str, Any]

    def for_client(self, client: Client) -> dict[str, Any]:
        """Return what a driver is told: addresses, and credentials of an account of its own."""
        email = f"{client.slug}@localhost"
        self.parts.accounts.create(email)
        return {
            **self.shared,
            "client": client.title,
            "version": client.version,
            "transport": client.transport,
            "url": self.url,
            "grpc": self.grpc,
            "slug": client.slug,
            "email": email,
            "key": self.parts.keys.create(email)[1],
            "token": self.parts.tokens.create(email, SCOPES, 3600),
        }

    def clear(self, told: dict[str, Any]) -> None:
        """Delete what a driver has left behind: a job that goes on would keep the next client waiting."""
        headers = {"authorization": f"Bearer {told['token']}"}
        with httpx2.Client(base_url=f"{self.url}/v1beta/", headers=headers, timeout=TIMEOUT) as http:
            left = http.get("tunedModels", params={"pageSize": 1000, "filter": "owner:me"}).json()
            for model in left.get("tunedModels", ()):
                http.delete(model["name"]).raise_for_status()


@contextmanager
def stage(folder: Path, tls: bool) -> Iterator[Stage]:
    """Set the stage in an empty folder, with a TLS server or without; the servers end with the block."""
    environment = {**tiny_catalog(folder / "tiny"), "TUNESMITH_ALIASES": json.dumps(ALIASES)}
    data_dir = folder / "data"
    data_dir.mkdir()
    with Server(data_dir, environment) as server:
        parts = Parts.open(Settings.load(data_dir=data_dir))
        shared = _people(parts) | _shelf(server, parts)
        made = issue(folder / "tls", ["localhost", "127.0.0.1"])
        with _tls(data_dir, environment, made) if tls else nullcontext("") as grpc:
            yield Stage(server.url, grpc, made.authority, parts, shared)
        parts.database.close()


def _people(parts: Parts) -> dict[str, Any]:
    keys = {}
    for email in (SHELF_OWNER, FRIEND, STRANGER):
        parts.accounts.create(email)
        keys[f"{email.partition('@')[0]}_key"] = parts.keys.create(email)[1]
    return keys | {"friend": FRIEND}


def _shelf(server: Server, parts: Parts) -> dict[str, Any]:
    """Tune the models that clients list and, where they cannot tune, ask."""
    headers = {"authorization": f"Bearer {parts.tokens.create(SHELF_OWNER, SCOPES, 3600)}"}
    server.http.headers.update(headers)
    names = [f"shelf-{number:02}" for number in range(1, SHELF + 1)]
    operations = [server.tune(job(epochs=1, batch=10), tunedModelId=name) for name in names]
    for operation in operations:
        assert "error" not in server.finished(operation)
    return {
        "shelf_model": "tunedModels/shelf-01",
        "shelf_size": SHELF,
        "base_model": f"models/{BASE}",
        "examples": EXAMPLES,
    }


@contextmanager
def _tls(data_dir: Path, environment: dict[str, str], made: Issued) -> Iterator[str]:
    """A second server on the same data dir, with TLS; yields where its gRPC is."""
    files = [f"--ssl-certfile={made.certificate}", f"--ssl-keyfile={made.key}"]
    with Server(data_dir, environment, "--workers", "0", *files, ca=made.authority) as server:
        yield f"localhost:{server.grpc.rpartition(':')[2]}"
