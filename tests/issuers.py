"""Issuers of OpenID Connect for tests: a real server of somebody else's, and one that can be made to misbehave."""

import base64
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import httpx2
from joserfc import jwt
from joserfc.jwk import ECKey, RSAKey
from joserfc.registry import HeaderParameter

Answer = Callable[[BaseHTTPRequestHandler], None]
"""What answers a GET."""

CALLBACK = "http://127.0.0.1/callback"


class RealIssuer:
    """oidc-provider-mock, whose tokens are its own doing; ends with the block."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "oidc_provider_mock", "--port", "0"], stderr=subprocess.PIPE, text=True
        )
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if found := re.search(r"running on (http://\S+)", line):
                self.url = found[1]
                return self
        raise AssertionError("oidc-provider-mock did not start")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.communicate()

    def sign_in(self, claims: dict[str, Any], client: str = "tunesmith") -> str:
        """Sign a person in at a client, by the authorization code flow, and return the ID token."""
        with httpx2.Client(base_url=self.url) as browser:
            browser.put(f"/users/{claims['sub']}", json=claims).raise_for_status()
            asked = {
                "response_type": "code",
                "client_id": client,
                "redirect_uri": CALLBACK,
                "scope": "openid email",
            }
            sent = browser.post("/oauth2/authorize", params=asked, data={"sub": claims["sub"]})
            (code,) = parse_qs(urlsplit(sent.headers["location"]).query)["code"]
            form = {"grant_type": "authorization_code", "code": code, "redirect_uri": CALLBACK}
            tokens = browser.post("/oauth2/token", data=form, auth=(client, "secret")).raise_for_status().json()
        token: str = tokens["id_token"]
        return token


class OwnIssuer:
    """A server with keys of its own, every answer of which a test can replace; ends with the block.

    Attributes:
        answers: By path.
        asked: The paths that were asked for.
    """

    def __init__(self) -> None:
        self.key = RSAKey.generate_key(2048, {"kid": "first"})
        self.asked: list[str] = []
        self.answers: dict[str, Answer] = {}
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.asked.append(self.path)
                issuer.answers[self.path](self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.answers["/.well-known/openid-configuration"] = page(
            {"issuer": self.url, "jwks_uri": f"{self.url}/keys"}
        )
        self.publish(self.key)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def publish(self, *keys: Any) -> None:
        """Have these as the public keys."""
        shown = [key.as_dict(private=False) if isinstance(key, RSAKey | ECKey) else key for key in keys]
        self.answers["/keys"] = page({"keys": shown})

    def claims(self, **changed: Any) -> dict[str, Any]:
        """The claims of a token that is good; what is None is left out."""
        now = int(time.time())
        claims = {
            "iss": self.url,
            "aud": "tunesmith",
            "sub": "1",
            "iat": now,
            "exp": now + 300,
            "email": "ada@example.com",
            "email_verified": True,
            **changed,
        }
        return {name: value for name, value in claims.items() if value is not None}

    def sign(self, key: RSAKey | ECKey | None = None, header: dict[str, Any] | None = None, **changed: Any) -> str:
        """Return a token of such claims, with the issuer's key unless another is given."""
        key = key or self.key
        protected = {"alg": "RS256", "kid": key.get("kid"), **(header or {})}
        kept = {name: value for name, value in protected.items() if value is not None}
        known = {"exp": HeaderParameter("of a test", "int")}
        registry = jwt.JWSRegistry(known, [kept["alg"]], strict_check_header=False)
        return jwt.encode(kept, self.claims(**changed), key, registry=registry)


def page(document: Any, status: int = 200, **headers: str) -> Answer:
    """An answer that is the same each time."""
    body = document if isinstance(document, bytes) else json.dumps(document).encode()

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in {"content-length": str(len(body)), **headers}.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(body)

    return answer


def encoded(part: Any) -> str:
    """A part of a JWT, to make one by hand."""
    raw = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
