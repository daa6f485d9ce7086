"""Browsers in which people sign in: password, cookie, and the token that proves a form to be ours."""

import hmac
import logging
import secrets
import time

from sqlalchemy import delete, select

from tunesmith.auth.accounts import Accounts
from tunesmith.auth.attempts import Attempts
from tunesmith.auth.tokens import digest
from tunesmith.errors import ApiError, PermissionDenied
from tunesmith.store import audit
from tunesmith.store.database import Database
from tunesmith.store.tables import Account, BrowserSession

SESSION_SECONDS = 12 * 3600
WRONG = "That e-mail address and password do not belong together."

log = logging.getLogger(__name__)


class SignIn:
    """Signs accounts in and out. A cookie of 256 random bits stands for the browser, before and after."""

    def __init__(self, database: Database, accounts: Accounts, attempts: Attempts) -> None:
        self._database, self._accounts, self._attempts = database, accounts, attempts

    def sign_in(self, email: str, password: str, address: str) -> str:
        """Return the cookie of a browser in which the account is signed in; it is new, whatever was there before.

        Raises:
            PermissionDenied: There is no such account, or it has another password; nothing tells which.
            ResourceExhausted: There were too many wrong passwords.
        """
        try:
            self._attempts.begin("password", email, address)
            account = self._accounts.with_password(email, password)
            if account is None:
                raise PermissionDenied(WRONG)
        except ApiError as error:
            log.warning("sign-in from %s refused: %s", address, error.status)
            with audit.request_from(address, "password"), self._database.write() as session:
                audit.tell_refused_sign_in(session, email, error.status)
            raise
        self._attempts.succeeded("password", email, address)
        cookie, now = new_cookie(), time.time()
        with audit.request_from(address, "password"), self._database.write() as session:
            audit.tell(session, account, "SignIn", f"accounts/{account}")
            session.execute(delete(BrowserSession).where(BrowserSession.expire_time < now))
            session.add(
                BrowserSession(
                    cookie_hash=digest(cookie),
                    account=account,
                    create_time=now,
                    expire_time=now + SESSION_SECONDS,
                )
            )
        log.info("sign-in of %s from %s", account, address)
        return cookie

    def account(self, cookie: str | None) -> str | None:
        """Return the account that is signed in in the browser with that cookie."""
        if not cookie:
            return None
        signed_in = (
            select(BrowserSession.account)
            .join(Account, Account.email == BrowserSession.account)
            .where(
                BrowserSession.cookie_hash == digest(cookie),
                BrowserSession.expire_time >= time.time(),
                Account.disabled.is_(False),
            )
        )
        with self._database.read() as session:
            return session.scalars(signed_in).first()

    def sign_out(self, cookie: str) -> None:
        """End what a cookie stands for."""
        with self._database.write() as session:
            session.execute(delete(BrowserSession).where(BrowserSession.cookie_hash == digest(cookie)))


def new_cookie() -> str:
    """Return a cookie for a browser in which nobody is signed in."""
    return secrets.token_urlsafe(32)


def form_token(cookie: str) -> str:
    """Return what each form of ours carries: who does not know the cookie cannot make it."""
    return digest(f"form {cookie}")


def is_form_token(token: str, cookie: str | None) -> bool:
    """Whether a form is one that we gave to the browser with that cookie."""
    return bool(cookie) and hmac.compare_digest(token.encode(), form_token(cookie or "").encode())
