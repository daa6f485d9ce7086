"""The tutorial's sign-in with the gcloud that is installed, over https, in a configuration of its own."""

import json
import re
import shutil
import socket
import socketserver
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import requests
from sqlalchemy import update

from browser import Browser
from oauth_client import database_of
from secure_site import EMAIL, GOOGLES, PASSWORD, Site
from servers import job
from tunesmith.store.tables import AccessToken

pytestmark = pytest.mark.skipif(
    shutil.which("gcloud") is None,
    reason="NO GCLOUD ON THIS MACHINE: the tutorial's sign-in lines were NOT tested",
)

AUTH = "https://www.googleapis.com/auth/"
SCOPES = f"{AUTH}cloud-platform,{AUTH}generative-language.tuning"
LOGIN = ("auth", "application-default", "login")
WAIT = 120  # seconds


class Gcloud:
    """gcloud in a configuration directory of its own."""

    def __init__(self, site: Site, home: Path, **variables: str) -> None:
        self.site = site
        self.environment = site.environment(home, **variables)
        self.credentials = Path(self.environment["CLOUDSDK_CONFIG"]) / "application_default_credentials.json"

    def run(self, *arguments: str, code: int = 0, typed: str = "", **variables: str) -> str:
        """Run a command; return what it prints, or its complaints when it is to fail."""
        done = subprocess.run(
            ["gcloud", *arguments],
            env={**self.environment, **variables},
            input=typed,
            capture_output=True,
            text=True,
            check=False,
            timeout=WAIT,
        )
        assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
        return f"{done.stdout}\n{done.stderr}"

    def sign_in(self, client_secret: Path, paste: Any) -> None:
        """Run the tutorial's line; `paste` makes what is typed at its question from the address that it prints."""
        line = [*LOGIN, "--no-browser", "--client-id-file", str(client_secret), f"--scopes={SCOPES}"]
        process = subprocess.Popen(
            ["gcloud", *line],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self.environment,
            text=True,
        )
        assert process.stdout is not None
        printed = ""
        while not (asked := re.search(r'--remote-bootstrap="([^"]+)"', printed)):
            letter = process.stdout.read(1)
            assert letter, printed
            printed += letter
        said, _ = process.communicate(f"{paste(asked[1])}\n", timeout=WAIT)
        assert process.returncode == 0, said
        assert "Credentials saved to file" in said

    def click_through(self, address: str) -> str:
        """Open the printed address in a browser and return the line that the page shows."""
        with Browser(self.site.server.url, self.site.trust) as browser:
            return browser.allow(address.removeprefix(self.site.server.url), EMAIL, PASSWORD).line

    def token(self, **variables: str) -> str:
        return self.run("auth", "application-default", "print-access-token", **variables).strip()


@pytest.fixture
def gcloud(site: Site, tmp_path: Path) -> Gcloud:
    return Gcloud(site, tmp_path)


def call(site: Site, token: str, method: str, path: str, body: Any = None) -> requests.Response:
    """Call the API as the tutorial's Python does."""
    headers = {"Authorization": f"Bearer {token}", "x-goog-user-project": "my-project-id"}
    url = f"{site.server.url}/{path}"
    return requests.request(method, url, json=body, headers=headers, verify=str(site.ca), timeout=WAIT)


def test_the_tutorial(site: Site, gcloud: Gcloud) -> None:
    gcloud.sign_in(site.client_secret(), gcloud.click_through)
    kept = json.loads(gcloud.credentials.read_text())
    assert kept["type"] == "external_account_authorized_user"  # which keeps our address, not Google's
    assert kept["token_url"] == f"{site.server.url}/token"
    token = gcloud.token()
    listed = subprocess.run(
        [
            *("curl", "-sS", "--cacert", str(site.ca), f"{site.server.url}/v1beta/tunedModels"),
            *("-H", f"Authorization: Bearer {token}", "-H", "x-goog-user-project: my-project-id"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(listed.stdout) == {}
    operation = call(site, token, "POST", "v1beta/tunedModels", job()).json()
    while not operation.get("done"):
        operation = call(site, token, "GET", f"v1/{operation['name']}").json()
    assert "error" not in operation
    name = operation["metadata"]["tunedModel"]
    assert [model["name"] for model in call(site, token, "GET", "v1beta/tunedModels").json()["tunedModels"]] == [
        name
    ]
    body = {"contents": [{"parts": [{"text": "1"}]}], "generationConfig": {"maxOutputTokens": 4}}
    assert call(site, token, "POST", f"v1beta/{name}:generateContent", body).json()["candidates"]


def test_expiry_refresh_and_revocation(site: Site, gcloud: Gcloud) -> None:
    gcloud.sign_in(site.client_secret(), gcloud.click_through)
    first = gcloud.token()
    database = database_of(site.server)
    with database.write() as session:
        session.execute(update(AccessToken).values(expire_time=time.time() - 1))
    database.close()
    assert call(site, first, "GET", "v1beta/tunedModels").status_code == 401
    second = gcloud.token()
    assert second != first
    assert call(site, second, "GET", "v1beta/tunedModels").status_code == 200
    kept = json.loads(gcloud.credentials.read_text())
    client = (kept["client_id"], kept["client_secret"])
    form = {"token": kept["refresh_token"]}
    assert requests.post(f"{site.server.url}/revoke", data=form, auth=client, verify=str(site.ca), timeout=WAIT).ok
    assert call(site, second, "GET", "v1beta/tunedModels").status_code == 401
    said = gcloud.run("auth", "application-default", "print-access-token", code=1)
    assert "invalid_grant" in said
    gcloud.run("auth", "application-default", "revoke", "--quiet")
    assert not gcloud.credentials.exists()


def test_the_remote_bootstrap_pair(site: Site, gcloud: Gcloud, tmp_path: Path) -> None:
    """The machine without a browser prints a command; the other one runs it and prints what is pasted back."""
    other = Gcloud(site, tmp_path / "other")

    def bootstrap(address: str) -> str:
        said = other.run(*LOGIN, f"--remote-bootstrap={address}", typed="y\n")
        found = re.search(r"https://localhost:\d+/\?\S+", said)
        assert found, said
        return found[0]

    gcloud.sign_in(site.client_secret(), bootstrap)
    assert call(site, gcloud.token(), "GET", "v1beta/tunedModels").status_code == 200


def test_with_a_browser_on_this_machine(site: Site, gcloud: Gcloud) -> None:
    line = [*LOGIN, "--client-id-file", str(site.client_secret()), f"--scopes={SCOPES}"]
    assert "Credentials saved to file" in gcloud.run(*line)
    assert call(site, gcloud.token(), "GET", "v1beta/tunedModels").status_code == 200
    gcloud.credentials.unlink()
    assert "missing_code" in gcloud.run(*line, code=1, PERSON_DECISION="deny")
    assert not gcloud.credentials.exists()


def test_a_file_as_googles_with_the_token_host_set(site: Site, gcloud: Gcloud) -> None:
    gcloud.sign_in(site.client_secret("--plain"), gcloud.click_through)
    assert json.loads(gcloud.credentials.read_text())["type"] == "authorized_user"
    host = {"CLOUDSDK_AUTH_TOKEN_HOST": f"{site.server.url}/token"}
    assert call(site, gcloud.token(**host), "GET", "v1beta/tunedModels").status_code == 200


def test_a_service_account(site: Site, gcloud: Gcloud, tmp_path: Path) -> None:
    key = tmp_path / "key.json"
    site.server.run("service-account", "create", "nightly@example.com", "--url", site.server.url, "-o", str(key))
    gcloud.run("auth", "activate-service-account", f"--key-file={key}")
    token = gcloud.run("auth", "print-access-token").strip()
    assert call(site, token, "GET", "v1beta/tunedModels").status_code == 200
    site.server.run("service-account", "delete", "nightly@example.com")
    assert call(site, token, "GET", "v1beta/tunedModels").status_code == 401


class Detour:
    """A proxy that leads Google's names to a site, as a company's could, and everything else nowhere."""

    def __init__(self, port: int) -> None:
        self.asked: list[str] = []
        asked = self.asked

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                host = self.rfile.readline().split()[1].decode().partition(":")[0]
                while self.rfile.readline().strip():
                    pass
                asked.append(host)
                if host not in GOOGLES:
                    self.wfile.write(b"HTTP/1.1 403 Forbidden\r\n\r\n")
                    return
                with socket.create_connection(("127.0.0.1", port)) as there:
                    self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
                    back = threading.Thread(target=pump, args=(there, self.connection), daemon=True)
                    back.start()
                    pump(self.connection, there)
                    back.join()

        class Proxy(socketserver.ThreadingTCPServer):
            daemon_threads = True

        self.server = Proxy(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]

    def __enter__(self) -> "Detour":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def pump(source: socket.socket, target: socket.socket) -> None:
    """Copy what arrives until it ends, and say so."""
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


def test_a_file_of_googles_and_a_detour(site: Site, tmp_path: Path) -> None:
    """Nobody changes the file: Google's names lead here, and even `revoke` reaches us."""
    file = tmp_path / "google.json"
    installed = {
        "client_id": "1234-abcd.apps.googleusercontent.com",
        "client_secret": "GOCSPX-something",
        "project_id": "my-project-id",
        "auth_uri": "https://accounts.google.com/o/oauth2/auth",
        "token_uri": "https://oauth2.googleapis.com/token",
        "auth_provider_x509_cert_url": "https://www.googleapis.com/oauth2/v1/certs",
        "redirect_uris": ["http://localhost"],
    }
    file.write_text(json.dumps({"installed": installed}))
    site.server.run("clients", "import", str(file), "--name", "Ours from before")
    assert "Ours from before" in site.server.run("clients", "list")
    with Detour(int(site.server.url.rpartition(":")[2])) as proxy:
        through = {
            "HTTPS_PROXY": f"http://127.0.0.1:{proxy.port}",
            "https_proxy": f"http://127.0.0.1:{proxy.port}",
        }
        gcloud = Gcloud(site, tmp_path, **through)

        def click_through(address: str) -> str:
            assert address.startswith("https://accounts.google.com/")
            return gcloud.click_through(address.replace("https://accounts.google.com", site.server.url))

        gcloud.sign_in(file, click_through)
        token = gcloud.token()
        assert call(site, token, "GET", "v1beta/tunedModels").status_code == 200
        gcloud.run("auth", "application-default", "revoke", "--quiet")
        assert call(site, token, "GET", "v1beta/tunedModels").status_code == 401
        assert "oauth2.googleapis.com" in proxy.asked
