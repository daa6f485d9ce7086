"""A program that signs people in at a test's server, as an installed one does."""

import base64
import hashlib
import json
import secrets
import ssl
from typing import Any
from urllib.parse import urlencode

import httpx2

from browser import Browser, Page
from servers import Server
from tunesmith.auth.accounts import Accounts
from tunesmith.auth.clients import Clients
from tunesmith.store.database import Database

AUTH = "https://www.googleapis.com/auth/"
TUTORIAL = f"{AUTH}cloud-platform {AUTH}generative-language.tuning"
LOOPBACK = "http://localhost:8085/"
PASSWORD = "correct horse"

_cookies: dict[tuple[str, str], httpx2.Cookies] = {}
"""Of each person at each server: passwords are slow to check."""


def database_of(server: Server) -> Database:
    return Database(f"sqlite:///{server.data_dir / 'tunesmith.db'}")


class Program:
    """A client of one server, and a person who uses it."""

    def __init__(self, server: Server, email: str, verify: ssl.SSLContext | bool = True) -> None:
        self.server, self.email, self.verify = server, email, verify
        database = database_of(server)
        if email not in [account.email for account in Accounts(database).list()]:
            Accounts(database).create(email, PASSWORD)
        self.id, self.secret = Clients(database).create("A <b>program</b>")
        database.close()
        self.http = httpx2.Client(base_url=server.url, verify=verify, timeout=60)
        self.verifier = secrets.token_urlsafe(48)

    def question(self, **changed: str) -> dict[str, str]:
        """The parameters that the program opens the browser with; an empty one is left out."""
        challenge = base64.urlsafe_b64encode(hashlib.sha256(self.verifier.encode()).digest()).decode().rstrip("=")
        asked = {
            "response_type": "code",
            "client_id": self.id,
            "redirect_uri": LOOPBACK,
            "scope": TUTORIAL,
            "state": "some state",
            "code_challenge": challenge,
            "code_challenge_method": "S256",
            **changed,
        }
        return {name: value for name, value in asked.items() if value}

    def address(self, **changed: str) -> str:
        return f"/o/oauth2/auth?{urlencode(self.question(**changed))}"

    def browser(self) -> Browser:
        return Browser(self.server.url, self.verify)

    def asked(self, decision: str = "allow", **changed: str) -> Page:
        """The person signs in, unless they did before, and decides; return what the browser then has."""
        with self.browser() as browser:
            browser.http.cookies = _cookies.setdefault((self.server.url, self.email), browser.http.cookies)
            return browser.allow(self.address(**changed), self.email, PASSWORD, decision)

    def code(self, **changed: str) -> str:
        return self.asked(**changed).told["code"]

    def post(self, path: str, status: int = 200, *, basic: bool = True, **form: str) -> dict[str, Any]:
        """Post a form as this client and return the JSON of an answer with the expected status."""
        own = {} if basic else {"client_id": self.id, "client_secret": self.secret}
        response = self.http.post(path, data={**own, **form}, auth=(self.id, self.secret) if basic else None)
        assert response.status_code == status, response.text
        answer: dict[str, Any] = json.loads(response.text)
        return answer

    def redeem(self, given: str, status: int = 200, **changed: str) -> dict[str, Any]:
        form = {"redirect_uri": LOOPBACK, "code_verifier": self.verifier, **changed}
        form = {name: value for name, value in form.items() if value}
        return self.post("/token", status, grant_type="authorization_code", code=given, **form)

    def signed_in(self, **changed: str) -> dict[str, Any]:
        return self.redeem(self.code(**changed))

    def refreshed(self, refresh_token: str, status: int = 200, **form: str) -> dict[str, Any]:
        return self.post("/token", status, grant_type="refresh_token", refresh_token=refresh_token, **form)

    def opens(self, token: str) -> bool:
        """Whether an access token opens the API."""
        answer = self.http.get("/v1beta/tunedModels", headers={"authorization": f"Bearer {token}"})
        assert answer.status_code in (200, 401), answer.text
        return answer.status_code == 200
