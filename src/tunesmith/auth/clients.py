"""OAuth clients: the programs that people sign in with."""

import hmac
import re
import secrets
import time
from collections.abc import Collection
from dataclasses import dataclass

from authlib.oauth2.rfc6749 import ClientMixin
from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError

from tunesmith.auth.tokens import digest
from tunesmith.errors import AlreadyExists, InvalidArgument, NotFound
from tunesmith.store.database import Database
from tunesmith.store.tables import Authorization, OAuthClient

OWN_CLIENT = "tunesmith-cli"
"""Our command line: it needs no file, and has no secret."""

PASTE_REDIRECT = "http://localhost:8085/"
"""Where a client without a browser is taken to listen; what it is told is shown to be pasted instead."""

# Any loopback port (RFC 8252, section 7.3). Nothing here that a browser reads otherwise than we do.
_LOOPBACK = re.compile(r"http://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?(/[A-Za-z0-9._~!$&'()*+,;=:@%/-]*)?")


@dataclass(frozen=True)
class Client(ClientMixin):
    """A client as Authlib's grants ask for it; `secret_hash` is None for one that keeps no secrets."""

    id: str
    name: str
    secret_hash: str | None

    def get_client_id(self) -> str:
        """Return the client's id."""
        return self.id

    def get_default_redirect_uri(self) -> str:
        """Return where to redirect when the request does not say."""
        return PASTE_REDIRECT

    def get_allowed_scope(self, scope: Collection[str] | str) -> str:
        """Return the scopes asked for, each once; all clients may ask for all."""
        return " ".join(dict.fromkeys(scope.split() if isinstance(scope, str) else scope or ()))

    def check_redirect_uri(self, redirect_uri: str) -> bool:
        """Whether it is on the loopback interface, and so on the machine of who signs in."""
        return _LOOPBACK.fullmatch(redirect_uri) is not None

    def check_client_secret(self, client_secret: str) -> bool:
        """Whether that is the client's secret."""
        return self.secret_hash is not None and hmac.compare_digest(self.secret_hash, digest(client_secret))

    def check_endpoint_auth_method(self, method: str, endpoint: str) -> bool:  # noqa: ARG002 — the same for all
        """Whether the client may authenticate so: gcloud uses both ways for one client."""
        return (method == "none") == (self.secret_hash is None)

    def check_response_type(self, response_type: str) -> bool:
        """Whether the client may ask for that at the authorization endpoint."""
        return response_type == "code"

    def check_grant_type(self, grant_type: str) -> bool:  # noqa: ARG002 — the same for all
        """Whether the client may use a grant that the server has."""
        return True


class Clients:
    """The clients in the database, and our own."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, name: str, client_id: str = "", secret: str = "") -> tuple[str, str]:
        """Return the id of a new client and its secret; both are made up unless they are given.

        Raises:
            InvalidArgument: The name is empty, too long or not printable.
            AlreadyExists: There is a client with that id.
        """
        if not name.strip() or len(name) > 80 or not name.isprintable():
            raise InvalidArgument("The client's name is shown to people: give 1 to 80 printable characters.")
        client_id = client_id or f"{secrets.token_hex(8)}.apps.tunesmith"
        secret = secret or f"tss_{secrets.token_urlsafe(24)}"
        row = OAuthClient(id=client_id, name=name.strip(), secret_hash=digest(secret), create_time=time.time())
        try:
            with self._database.write() as session:
                session.add(row)
        except IntegrityError:
            raise AlreadyExists(f"There is a client {client_id} already. See: tunesmith clients list") from None
        return client_id, secret

    def list(self) -> list[OAuthClient]:
        """Return the clients, the oldest first."""
        with self._database.read() as session:
            return [*session.scalars(select(OAuthClient).order_by(OAuthClient.create_time))]

    def revoke(self, client_id: str) -> None:
        """Refuse a client from now on, and end all that people allowed it.

        Raises:
            NotFound: There is no such client.
        """
        with self._database.write() as session:
            client = session.get(OAuthClient, client_id)
            if client is None:
                raise NotFound(f"There is no client {client_id}. See: tunesmith clients list")
            session.execute(delete(Authorization).where(Authorization.client == client_id))
            session.delete(client)

    def find(self, client_id: str) -> Client | None:
        """Return a client by its id."""
        if client_id == OWN_CLIENT:
            return Client(OWN_CLIENT, "The tunesmith command", None)
        with self._database.read() as session:
            row = session.get(OAuthClient, client_id)
        return Client(row.id, row.name, row.secret_hash) if row else None


def client_secret_file(
    client_id: str, secret: str, root: str, project: str, *, plain: bool = False
) -> dict[str, dict[str, object]]:
    """Return what `client_secret.json` holds, for gcloud and google-auth-oauthlib.

    Args:
        client_id: Id of a client.
        secret: Its secret.
        root: The server's address, without a slash at its end.
        project: A label.
        plain: Leave out what makes gcloud keep our addresses in the credential that it writes.
    """
    installed: dict[str, object] = {
        "client_id": client_id,
        "client_secret": secret,
        "project_id": project,
        "auth_uri": f"{root}/o/oauth2/auth",
        "token_uri": f"{root}/token",
        "auth_provider_x509_cert_url": f"{root}/oauth2/v3/certs",
        "redirect_uris": ["http://localhost"],
    }
    if not plain:
        installed |= {"3pi": True, "token_info_url": f"{root}/introspect"}
    return {"installed": installed}
