"""People who call one server, each with a credential of their own."""

from contextlib import suppress
from typing import Any

from servers import Server
from tunesmith.auth.accounts import Accounts
from tunesmith.auth.api_keys import ApiKeys
from tunesmith.errors import AlreadyExists
from tunesmith.store.database import Database


class Person:
    """An account of a running server; all calls are its own."""

    def __init__(self, server: Server, email: str, project: str | None = None) -> None:
        self._server, self.email = server, email
        database = Database(f"sqlite:///{server.data_dir / 'tunesmith.db'}")
        with suppress(AlreadyExists):  # a test module before this one knows them
            Accounts(database).create(email)
        _, key = ApiKeys(database).create(email)
        database.close()
        self.headers = {"authorization": "", "x-goog-api-key": key}
        if project:
            self.headers["x-goog-user-project"] = project

    def status(self, method: str, path: str, body: Any = None) -> int:
        """Make a call and return the HTTP status of the answer."""
        return self._server.http.request(method, f"/v1beta/{path}", json=body, headers=self.headers).status_code

    def call(self, method: str, path: str, body: Any = None, code: int = 200, **options: Any) -> Any:
        """Make a call and return the JSON of an answer with the expected code."""
        return self._server.call(method, path, body, code, headers=self.headers, **options)

    def names(self, **parameters: Any) -> list[str]:
        """List tuned models, all in one page."""
        page = self.call("GET", "tunedModels", params={"pageSize": 1000, **parameters})
        return [model["name"] for model in page.get("tunedModels", [])]


def share(server: Server, model: str, role: str, email: str = "", kind: str = "USER") -> dict[str, Any]:
    """Share a model of the first account."""
    body = {"role": role, "granteeType": kind, **({"emailAddress": email} if email else {})}
    permission: dict[str, Any] = server.call("POST", f"{model}/permissions", body)
    return permission
