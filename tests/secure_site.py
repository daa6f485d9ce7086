"""A server over https with an authority of its own, and environments in which programs trust only that."""

import os
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trustme

from servers import Server

EMAIL, PASSWORD = "ada@example.com", "correct horse"
GOOGLES = ("accounts.google.com", "oauth2.googleapis.com")
CA_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")


@dataclass(frozen=True)
class Site:
    """A server and the files that belong to it."""

    server: Server
    folder: Path

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    @property
    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.ca)

    def client_secret(self, *options: str) -> Path:
        """Issue a client_secret.json, as a person does."""
        file = self.folder / f"client_secret{len(list(self.folder.glob('client_secret*')))}.json"
        self.server.run("client-secret", "--url", self.server.url, "-o", str(file), *options)
        return file

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """An environment of nobody else's: no settings, no proxy but one that refuses, a browser with a person."""
        kept = {name: value for name, value in os.environ.items() if name not in CA_VARIABLES}
        return {
            **{name: value for name, value in kept.items() if not name.lower().endswith("_proxy")},
            "HOME": str(home),
            "CLOUDSDK_CONFIG": str(home / "gcloud"),
            "CLOUDSDK_CORE_CUSTOM_CA_CERTS_FILE": str(self.ca),
            "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "1",
            "HTTPS_PROXY": "http://127.0.0.1:9",  # what leaves the machine would show as an error
            "NO_PROXY": "127.0.0.1,localhost",
            "BROWSER": f"{sys.executable} {Path(__file__).with_name('person.py')} %s &",
            "DISPLAY": ":0",
            "PERSON_CA": str(self.ca),
            "PERSON_EMAIL": EMAIL,
            "PERSON_PASSWORD": PASSWORD,
            **more,
        }


@contextmanager
def running_site(folder: Path, data_dir: Path, environment: dict[str, str]) -> Iterator[Site]:
    """A site with the account of a person, until the block ends."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    own = authority.issue_cert("localhost", "127.0.0.1", *GOOGLES)
    own.private_key_pem.write_to_path(folder / "server.key")
    for number, blob in enumerate(own.cert_chain_pems):
        blob.write_to_path(folder / "server.pem", append=number > 0)
    options = ("--ssl-certfile", str(folder / "server.pem"), "--ssl-keyfile", str(folder / "server.key"))
    with Server(data_dir, environment, *options, ca=folder / "ca.pem") as server:
        server.run("accounts", "create", EMAIL, "--password-stdin", input=f"{PASSWORD}\n")
        yield Site(server, folder)
