"""What people allowed clients to do: codes, refresh tokens and the access tokens made from them.

Only hashes are stored. Deleting an authorization ends all its tokens at once.
"""

import secrets
import time
from dataclasses import dataclass

from sqlalchemy import delete, or_, select
from sqlalchemy.orm import Session

from tunesmith.auth.tokens import digest, new_token
from tunesmith.errors import NotFound
from tunesmith.store import audit
from tunesmith.store.database import Database
from tunesmith.store.tables import AccessToken, Account, Authorization, AuthorizationCode, DeviceCode

CODE_SECONDS = 300
CODE_KEPT_SECONDS = 86_400  # after a code's end, so that its second use is recognized
MOST_OF_A_CLIENT = 100  # authorizations of one account for one client; Google's number


@dataclass(frozen=True)
class Issued:
    """What a client is given."""

    account: str
    scopes: str
    access_token: str
    refresh_token: str | None
    nonce: str | None = None


@dataclass(frozen=True)
class Code:
    """A code as Authlib's grant asks for it."""

    hash: str
    scopes: str
    redirect_uri: str
    code_challenge: str

    def get_redirect_uri(self) -> str:
        """Return where the client was told it."""
        return self.redirect_uri

    def get_scope(self) -> str:
        """Return the scopes, separated by spaces."""
        return self.scopes


@dataclass(frozen=True)
class Refreshable:
    """An authorization as Authlib's refresh grant asks for it."""

    id: str
    account: str
    client: str
    scopes: str

    def check_client(self, client: object) -> bool:
        """Whether it was given to that client."""
        return getattr(client, "id", None) == self.client

    def get_scope(self) -> str:
        """Return the scopes, separated by spaces."""
        return self.scopes


@dataclass(frozen=True)
class TokenInfo:
    """What a good token stands for; `client` is None for one that no client was given."""

    kind: str
    account: str
    client: str | None
    scopes: str
    create_time: float
    expire_time: float | None


class Authorizations:
    """The authorizations in the database.

    Args:
        database: Where they are.
        token_seconds: How long access tokens are good.
    """

    def __init__(self, database: Database, token_seconds: int) -> None:
        self._database = database
        self.token_seconds = token_seconds

    def issue_code(
        self, account: str, client: str, scopes: str, redirect_uri: str, code_challenge: str, nonce: str | None
    ) -> str:
        """Return a code that the client exchanges for tokens once, within minutes."""
        code, now = f"4/{secrets.token_urlsafe(32)}", time.time()
        with self._database.write() as session:
            audit.tell(session, account, "AllowClient", f"clients/{client}", scopes)
            forget_expired(session, now)
            session.add(
                AuthorizationCode(
                    code_hash=digest(code),
                    account=account,
                    client=client,
                    scopes=scopes,
                    redirect_uri=redirect_uri,
                    code_challenge=code_challenge,
                    nonce=nonce,
                    expire_time=now + CODE_SECONDS,
                )
            )
        return code

    def find_code(self, code: str, client: str) -> Code | None:
        """Return a code of a client that is good; a used one ends what its use gave (RFC 6749, section 4.1.2)."""
        with self._database.write() as session:
            row = session.get(AuthorizationCode, digest(code))
            if row is None or row.client != client:
                return None
            if row.used:
                session.execute(delete(Authorization).where(Authorization.id == row.authorization))
                return None
            good = row.expire_time >= time.time()
            return Code(row.code_hash, row.scopes, row.redirect_uri, row.code_challenge) if good else None

    def redeem(self, code: Code) -> Issued | None:
        """Use a code and return what it gives; None when it was used meanwhile, or the account is disabled."""
        with self._database.write() as session:
            row = session.get(AuthorizationCode, code.hash, with_for_update=True)
            if row is None or not _active(session, row.account):
                return None
            if row.used:  # at this moment, by somebody else who has it
                session.execute(delete(Authorization).where(Authorization.id == row.authorization))
                return None
            row.used = True
            row.authorization, issued = self._authorize(session, row.account, row.client, row.scopes, row.nonce)
            return issued

    def redeem_device(self, code_hash: str) -> Issued | None:
        """Use an approved device code, which is then gone; None when it was used meanwhile."""
        with self._database.write() as session:
            row = session.get(DeviceCode, code_hash, with_for_update=True)
            if row is None or row.account is None or not row.approved or not _active(session, row.account):
                return None
            _, issued = self._authorize(session, row.account, row.client, row.scopes, None)
            session.delete(row)
            return issued

    def _authorize(
        self, session: Session, account: str, client: str, scopes: str, nonce: str | None
    ) -> tuple[str, Issued]:
        authorization, refresh, now = secrets.token_hex(8), f"1//{secrets.token_urlsafe(32)}", time.time()
        mine = select(Authorization.id).where(Authorization.account == account, Authorization.client == client)
        oldest = session.scalars(mine.order_by(Authorization.use_time.desc()).offset(MOST_OF_A_CLIENT - 1)).all()
        session.execute(delete(Authorization).where(Authorization.id.in_(oldest)))
        session.add(
            Authorization(
                id=authorization,
                account=account,
                client=client,
                scopes=scopes,
                refresh_hash=digest(refresh),
                create_time=now,
                use_time=now,
            )
        )
        session.flush()  # before the token, which refers to it
        token = new_token(session, account, scopes, self.token_seconds, authorization)
        return authorization, Issued(account, scopes, token, refresh, nonce)

    def find_refresh(self, refresh_token: str) -> Refreshable | None:
        """Return what a refresh token stands for: known, not revoked, its account not disabled."""
        columns = (Authorization.id, Authorization.account, Authorization.client, Authorization.scopes)
        found = (
            select(*columns)
            .join(Account, Account.email == Authorization.account)
            .where(Authorization.refresh_hash == digest(refresh_token), Account.disabled.is_(False))
        )
        with self._database.read() as session:
            row = session.execute(found).first()
            return Refreshable(*row) if row else None

    def refresh(self, found: Refreshable, scopes: str) -> Issued | None:
        """Return a new access token; the refresh token stays good. None when it was revoked meanwhile."""
        now = time.time()
        with self._database.write() as session:
            row = session.get(Authorization, found.id, with_for_update=True)
            if row is None:
                return None
            forget_expired(session, now)
            row.use_time = now
            token = new_token(session, row.account, scopes, self.token_seconds, row.id)
            return Issued(row.account, scopes, token, None)

    def inspect(self, token: str) -> TokenInfo | None:
        """Return what an access token or a refresh token that is good stands for."""
        hashed, now = digest(token), time.time()
        with self._database.read() as session:
            access = session.get(AccessToken, hashed)
            parent = session.get(Authorization, access.authorization) if access and access.authorization else None
            refresh = session.scalars(select(Authorization).where(Authorization.refresh_hash == hashed)).first()
            found, origin = access or refresh, parent or refresh
            if found is None or not _active(session, found.account):
                return None
            until = access.expire_time if access else None
            if until is not None and until < now:
                return None
            kind, client = "access_token" if access else "refresh_token", origin.client if origin else None
            return TokenInfo(kind, found.account, client, found.scopes, found.create_time, until)

    def revoke_token(self, token: str) -> None:
        """End an access token or a refresh token, and with it the authorization it comes from, as Google does."""
        hashed = digest(token)
        with self._database.write() as session:
            parent = select(AccessToken.authorization).where(AccessToken.token_hash == hashed)
            ended = or_(Authorization.refresh_hash == hashed, Authorization.id.in_(parent))
            owner = session.scalar(select(Authorization.account).where(ended)) or session.scalar(
                select(AccessToken.account).where(AccessToken.token_hash == hashed)
            )
            if owner:
                audit.tell(session, owner, "RevokeToken", f"accounts/{owner}")
            session.execute(delete(Authorization).where(ended).execution_options(synchronize_session=False))
            session.execute(delete(AccessToken).where(AccessToken.token_hash == hashed))

    def list(self, account: str) -> list[Authorization]:
        """Return what an account allowed, the newest use first."""
        mine = select(Authorization).where(Authorization.account == account)
        with self._database.read() as session:
            return [*session.scalars(mine.order_by(Authorization.use_time.desc()))]

    def revoke(self, authorization: str, account: str) -> None:
        """End an authorization of an account.

        Raises:
            NotFound: The account has no such authorization.
        """
        with self._database.write() as session:
            row = session.get(Authorization, authorization)
            if row is None or row.account != account:
                raise NotFound(f"{account} has no authorization {authorization}.")
            audit.tell(session, account, "RevokeAuthorization", f"clients/{row.client}")
            session.delete(row)


def forget_expired(session: Session, now: float) -> None:
    """Delete what is past its time and serves nothing any more."""
    session.execute(delete(AccessToken).where(AccessToken.expire_time < now))
    session.execute(delete(DeviceCode).where(DeviceCode.expire_time < now - CODE_KEPT_SECONDS))
    session.execute(delete(AuthorizationCode).where(AuthorizationCode.expire_time < now - CODE_KEPT_SECONDS))


def _active(session: Session, account: str) -> bool:
    row = session.get(Account, account)
    return row is not None and not row.disabled
