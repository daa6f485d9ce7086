"""`tunesmith login`: signs this machine in, and keeps the credential where only its user can read it."""

import base64
import hashlib
import html
import json
import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from tunesmith.client import ClientError, TokenRefused, post_form

CLIENT_ID = "tunesmith-cli"
SCOPES = (
    "https://www.googleapis.com/auth/cloud-platform https://www.googleapis.com/auth/generative-language.tuning"
)
DEVICE_CODE = "urn:ietf:params:oauth:grant-type:device_code"
PATIENCE = 600.0  # seconds for somebody to sign in
MARGIN = 60.0  # seconds before its end at which a token is replaced
_DONE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>Tunesmith</title>
<body style="font: 16px/1.5 system-ui, sans-serif; display: grid; place-content: center; min-height: 90vh">
<h1>{title}</h1><p>You can close this page and go back to the terminal.</p>"""


@dataclass
class Login:
    """What is kept of one sign-in; times are seconds since the epoch."""

    url: str
    refresh_token: str
    access_token: str
    expire_time: float
    ca_file: str | None = None

    def token(self) -> str:
        """Return an access token that is good for a while; it is kept for the next command.

        Raises:
            ClientError: The sign-in was ended at the server, or no server answers.
        """
        return self.access_token if time.time() < self.expire_time - MARGIN else self.refresh()

    def refresh(self) -> str:
        """Return a new access token; raises as `token` does."""
        form = {"grant_type": "refresh_token", "refresh_token": self.refresh_token, "client_id": CLIENT_ID}
        try:
            answer = post_form(self.url, "/token", form, self.ca_file)
        except TokenRefused as error:
            again = f"Sign in again: tunesmith login --url {self.url}"
            raise ClientError(f"You are signed out of {self.url} ({error}). {again}") from error
        self.access_token, self.expire_time = answer["access_token"], time.time() + answer["expires_in"]
        keep(self)
        return self.access_token


def credentials_file() -> Path:
    """Return where sign-ins are kept."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "tunesmith" / "credentials.json"


def find(url: str | None) -> Login | None:
    """Return the sign-in at a server; the newest one when none is named."""
    logins = _read()
    key = (url or "").rstrip("/") or next(reversed(logins), "")
    return Login(**logins[key]) if key in logins else None


def keep(login: Login) -> None:
    """Keep a sign-in, in place of an older one at that server."""
    logins = _read()
    if list(logins)[-1:] != [login.url]:
        logins.pop(login.url, None)  # the newest comes last
    logins[login.url] = asdict(login)
    _write(logins)


def forget(login: Login) -> None:
    """Sign out: end a sign-in at its server, and forget it here even when the server does not answer.

    Raises:
        ClientError: No server answered.
    """
    logins = _read()
    logins.pop(login.url, None)
    _write(logins)
    post_form(login.url, "/revoke", {"token": login.refresh_token, "client_id": CLIENT_ID}, login.ca_file)


def in_browser(url: str, ca_file: str | None, show: Callable[[str], object]) -> Login:
    """Sign in in a browser on this machine.

    Args:
        url: The server's address.
        ca_file: The authority that signed its certificate, in PEM; None for those this machine trusts.
        show: Opens an address in the browser, or tells the person to.

    Raises:
        ClientError: The person denied it, or the server refused.
    """
    root, state, verifier = url.rstrip("/"), secrets.token_urlsafe(16), secrets.token_urlsafe(48)
    challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).decode().rstrip("=")
    with _Listener(state) as listener:
        question = {
            "response_type": "code",
            "client_id": CLIENT_ID,
            "redirect_uri": listener.address,
            "scope": SCOPES,
            "state": state,
            "code_challenge": challenge,
            "code_challenge_method": "S256",
        }
        show(f"{root}/o/oauth2/auth?{urlencode(question)}")
        told = listener.wait()
    if "code" not in told:
        raise ClientError(f"Not signed in: {told.get('error', 'the browser brought no code')}.")
    form = {
        "grant_type": "authorization_code",
        "code": told["code"],
        "redirect_uri": listener.address,
        "code_verifier": verifier,
        "client_id": CLIENT_ID,
    }
    return _kept(root, ca_file, post_form(root, "/token", form, ca_file))


def with_device_code(url: str, ca_file: str | None, show: Callable[[dict[str, Any]], object]) -> Login:
    """Sign in in a browser elsewhere; arguments as for `in_browser`, but `show` gets the server's answer.

    Raises:
        ClientError: The person denied it or took too long, or the server refused.
    """
    root = url.rstrip("/")
    asked = post_form(root, "/device/code", {"client_id": CLIENT_ID, "scope": SCOPES}, ca_file)
    show(asked)
    form = {"grant_type": DEVICE_CODE, "device_code": asked["device_code"], "client_id": CLIENT_ID}
    pause = float(asked["interval"])
    while True:
        time.sleep(pause)
        try:
            return _kept(root, ca_file, post_form(root, "/token", form, ca_file))
        except TokenRefused as error:
            if error.code == "slow_down":
                pause += 5.0  # RFC 8628, section 3.5
            elif error.code != "authorization_pending":
                raise ClientError(f"Not signed in: {error}") from error


class _Listener:
    """Listens on the loopback interface for the one answer that carries the state; a context manager."""

    def __init__(self, state: str) -> None:
        self._told: dict[str, str] = {}
        self._arrived = threading.Event()
        told, arrived = self._told, self._arrived

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                brought = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
                ours = brought.get("state") == state
                title = "Not for us" if not ours else "Signed in" if "code" in brought else "Access denied"
                page = _DONE.format(title=html.escape(title)).encode()
                self.send_response(200 if ours else 404)
                self.send_header("content-type", "text/html; charset=utf-8")
                self.send_header("content-length", str(len(page)))
                self.end_headers()
                self.wfile.write(page)
                if ours:
                    told.update(brought)
                    arrived.set()

            def log_message(self, *_: object) -> None:
                """The address has the code in it: it is not logged."""

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}/"

    def __enter__(self) -> "_Listener":
        threading.Thread(target=self._server.serve_forever, name="sign-in", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def wait(self) -> dict[str, str]:
        if not self._arrived.wait(PATIENCE):
            raise ClientError("Not signed in: the browser did not come back. With --device any browser will do.")
        return self._told


def _kept(root: str, ca_file: str | None, answer: dict[str, Any]) -> Login:
    until = time.time() + answer["expires_in"]
    login = Login(root, answer["refresh_token"], answer["access_token"], until, ca_file)
    keep(login)
    return login


def _read() -> dict[str, dict[str, Any]]:
    try:
        found: dict[str, dict[str, Any]] = json.loads(credentials_file().read_text("utf-8"))
    except FileNotFoundError:
        return {}
    return found


def _write(logins: dict[str, dict[str, Any]]) -> None:
    """Replace the file at once, readable for its owner only from the first byte on."""
    file = credentials_file()
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = file.with_suffix(f".{os.getpid()}")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as out:
        json.dump(logins, out, indent=2)
    new.replace(file)
