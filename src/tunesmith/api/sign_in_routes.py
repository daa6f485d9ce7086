"""The pages' routes: sign in and out, allow a program, connect a device, take access back.

Every form carries a token that follows from the browser's cookie, and must come from a page of this server.
"""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from authlib.common.security import is_secure_transport
from authlib.oauth2 import OAuth2Error
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from tunesmith.api.oauth_routes import FormError, query_of, read_form
from tunesmith.api.sign_in_page import (
    App,
    Page,
    account_page,
    consent_page,
    device_consent_page,
    device_page,
    message_page,
    paste_page,
    sign_in_page,
)
from tunesmith.auth.attempts import Attempts
from tunesmith.auth.authorizations import CODE_SECONDS
from tunesmith.auth.device_codes import Pending
from tunesmith.auth.oauth_server import Consent, OAuthCall, OAuthServer
from tunesmith.auth.scopes import in_words
from tunesmith.auth.sign_in import SESSION_SECONDS, SignIn, form_token, is_form_token, new_cookie
from tunesmith.errors import ApiError, NotFound
from tunesmith.store import audit

# The pages that one may be sent to after signing in: nothing on another server, and nothing that acts.
_OWN_PAGES = re.compile(r"/(o/oauth2/(v2/)?auth|device|account)(\?[!-~]*)?")
_HEADERS = {
    "cache-control": "no-store",
    "referrer-policy": "same-origin",  # no-referrer would hide the Origin that forms are checked by
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
}


@dataclass(frozen=True)
class _Visit:
    """A browser's request.

    Attributes:
        root: This server's address as the browser sees it.
        path: The path and query, as they came.
        query: The query's parameters.
        form: The form's fields.
        cookie: The browser's cookie; a new one when it brought none.
        account: Who is signed in in it.
        address: Where it is.
    """

    root: str
    path: str
    query: list[tuple[str, str]]
    form: dict[str, str]
    cookie: str
    account: str | None
    address: str

    @property
    def token(self) -> str:
        return form_token(self.cookie)


_Handler = Callable[[_Visit], Response]


def sign_in_routes(
    server: OAuthServer, sign_in: SignIn, attempts: Attempts, root: Callable[[Request], str], *, insecure: bool
) -> list[BaseRoute]:
    """Return the routes.

    Args:
        server: What programs are allowed.
        sign_in: Who is signed in.
        attempts: Counts guesses at device codes.
        root: Tells the server's address as the browser sees it.
        insecure: Let people sign in over http from other machines.
    """
    pages = _Pages(server, sign_in, attempts)

    def page(show: _Handler, act: _Handler) -> Any:
        async def endpoint(request: Request) -> Response:
            if not insecure and not is_secure_transport(root(request)):
                why = "Passwords go over https only. Ask who runs this server for its https address."
                return _html(message_page("This address is not safe", why), 403)
            try:
                form = dict(await read_form(request))
                query = query_of(request)
            except FormError as error:
                return _html(message_page("That did not work", str(error)), 400)
            address = request.client.host if request.client else ""
            with audit.request_from(address, "browser session"):
                return await run_in_threadpool(_respond, sign_in, request, root(request), query, form, show, act)

        return endpoint

    both, post = ["GET", "POST"], ["POST"]
    authorize = page(pages.authorize, pages.decide)
    return [
        Route("/o/oauth2/auth", authorize, methods=both),
        Route("/o/oauth2/v2/auth", authorize, methods=both),
        Route("/signin", page(pages.ask, pages.enter), methods=both),
        Route("/signout", page(pages.leave, pages.leave), methods=post),
        Route("/device", page(pages.device, pages.connect), methods=both),
        Route("/account", page(pages.programs, pages.remove), methods=both),
    ]


def _respond(
    sign_in: SignIn,
    request: Request,
    root: str,
    query: list[tuple[str, str]],
    form: dict[str, str],
    show: _Handler,
    act: _Handler,
) -> Response:
    brought = request.cookies.get(_cookie_name(root))
    visit = _Visit(
        root=root,
        path=request.url.path + (f"?{request.url.query}" if request.url.query else ""),
        query=query,
        form=form,
        cookie=brought or new_cookie(),
        account=sign_in.account(brought),
        address=request.client.host if request.client else "",
    )
    if request.method != "POST":
        response = show(visit)
    elif _is_ours(request, visit):
        response = act(visit)
    else:
        text = "This form is too old, or is not one of this server's. Go back, load the page again and repeat."
        response = _html(message_page("That did not work", text), 403)
    if brought is None and "set-cookie" not in response.headers:
        _keep(response, root, visit.cookie)
    return response


class _Pages:
    """What each page shows, and what its forms do."""

    def __init__(self, server: OAuthServer, sign_in: SignIn, attempts: Attempts) -> None:
        self._server, self._sign_in, self._attempts = server, sign_in, attempts

    def authorize(self, visit: _Visit) -> Response:
        """Ask whether a program may use the account; first of all, whose."""
        try:
            consent = self._server.consent(_call(visit))
        except OAuth2Error as error:
            return self._bad_request(error)
        if visit.account is None:
            return _html(sign_in_page(visit.token, visit.path, dict(visit.query).get("login_hint", "")))
        page = consent_page(
            visit.token,
            visit.path,
            visit.path,
            client=consent.client,
            account=visit.account,
            allows=in_words(consent.scopes),
            answer_to="" if consent.pasted else consent.redirect_uri,
        )
        return _html(page, form_targets=_form_target(consent))

    def decide(self, visit: _Visit) -> Response:
        """Tell the program what the person decided."""
        if visit.account is None:  # the session ended while the page was open
            return self.authorize(visit)
        allowed = visit.form.get("decision") == "allow"
        try:
            consent = self._server.consent(_call(visit))
            answer = self._server.decide(_call(visit), visit.account, allowed=allowed)
        except OAuth2Error as error:
            return self._bad_request(error)
        told = answer.headers["Location"]
        if not consent.pasted:
            return RedirectResponse(told, 303, _HEADERS)
        if not allowed:
            return _html(message_page("Access denied", "Nothing was given. You can close this page."))
        # gcloud takes the line with https only, though nothing listens there.
        return _html(paste_page(told.replace("http:", "https:", 1), CODE_SECONDS // 60))

    def ask(self, visit: _Visit) -> Response:
        """Ask for a password, or show the account when somebody is signed in."""
        where = dict(visit.query).get("where", "")
        if visit.account is not None:
            return RedirectResponse(_own_page(where), 303, _HEADERS)
        return _html(sign_in_page(visit.token, _own_page(where)))

    def enter(self, visit: _Visit) -> Response:
        """Sign in and go on."""
        email, where = visit.form.get("email", ""), _own_page(visit.form.get("where", ""))
        try:
            cookie = self._sign_in.sign_in(email, visit.form.get("password", ""), visit.address)
        except ApiError as error:
            return _html(sign_in_page(visit.token, where, email, error.message), int(error.http))
        response = RedirectResponse(where, 303, _HEADERS)
        _keep(response, visit.root, cookie, SESSION_SECONDS)
        return response

    def leave(self, visit: _Visit) -> Response:
        """Sign out; ask who comes next when a page is to be gone on to."""
        self._sign_in.sign_out(visit.cookie)
        where = visit.form.get("where", "")
        response: Response = _html(message_page("Signed out", "You can close this page."))
        if where and where != "/account":
            response = RedirectResponse(_own_page(where), 303, _HEADERS)
        _keep(response, visit.root, new_cookie())
        return response

    def device(self, visit: _Visit) -> Response:
        """Ask for a device's code."""
        if visit.account is None:
            return _html(sign_in_page(visit.token, visit.path))
        return _html(device_page(visit.token, visit.account, dict(visit.query).get("user_code", "")))

    def connect(self, visit: _Visit) -> Response:
        """Find what a code stands for and ask; then let the device in, or not."""
        if visit.account is None:
            return _html(sign_in_page(visit.token, "/device"))
        code, decision = visit.form.get("code", ""), visit.form.get("decision")
        try:
            found = self._awaiting(code, visit)
        except ApiError as error:
            return _html(device_page(visit.token, visit.account, code, error.message), int(error.http))
        if decision is None:
            client = self._server.clients.find(found.client)
            page = device_consent_page(
                visit.token,
                found.user_code,
                client=client.name if client else found.client,
                account=visit.account,
                allows=in_words(found.scopes.split()),
            )
            return _html(page)
        self._server.devices.decide(found, visit.account, approved=decision == "allow")
        if decision == "allow":
            return _html(message_page("Connected", "The device goes on by itself. You can close this page."))
        return _html(message_page("Access denied", "Nothing was given. You can close this page."))

    def _awaiting(self, code: str, visit: _Visit) -> Pending:
        """Return what a code stands for.

        Raises:
            NotFound: It stands for nothing.
            ResourceExhausted: Too many codes were tried.
        """
        account = visit.account or ""
        self._attempts.begin("device code", account, visit.address)
        found = self._server.devices.awaiting(code)
        if found is None:
            raise NotFound("There is no such code, or it is too old. Look at it again.")
        self._attempts.succeeded("device code", account, visit.address)
        return found

    def programs(self, visit: _Visit) -> Response:
        """Show what the account allowed."""
        if visit.account is None:
            return _html(sign_in_page(visit.token, "/account"))
        apps = []
        for one in self._server.authorizations.list(visit.account):
            client = self._server.clients.find(one.client)
            name = client.name if client else one.client
            apps.append(App(one.id, name, in_words(one.scopes.split()), one.create_time, one.use_time))
        return _html(account_page(visit.token, visit.account, apps))

    def remove(self, visit: _Visit) -> Response:
        """Take back what the account allowed a program."""
        if visit.account is not None:
            with suppress(NotFound):  # it is gone: that is what was asked for
                self._server.authorizations.revoke(visit.form.get("app", ""), visit.account)
        return RedirectResponse("/account", 303, _HEADERS)

    def _bad_request(self, error: OAuth2Error) -> Response:
        answer = self._server.refusal(error)
        if "Location" in answer.headers:
            return RedirectResponse(answer.headers["Location"], 303, _HEADERS)
        why = f"{answer.body.get('error')}: {answer.body.get('error_description', '')}"
        return _html(message_page("This sign-in request is not good", why, "Nothing was given."), 400)


def _is_ours(request: Request, visit: _Visit) -> bool:
    """Whether a form was filled in on a page that this browser got from this server."""
    origin = request.headers.get("origin")
    if origin is not None and origin != visit.root:
        return False
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return False
    return is_form_token(visit.form.get("token", ""), visit.cookie)


def _call(visit: _Visit) -> OAuthCall:
    return OAuthCall("GET", visit.root, visit.query)


def _own_page(where: str) -> str:
    return where if _OWN_PAGES.fullmatch(where) else "/account"


def _form_target(consent: Consent) -> str:
    """Return where the consent form leads, for the policy: browsers hold redirects against it, too."""
    target = urlsplit(consent.redirect_uri)
    # An IPv6 address cannot be named there.
    return "http:" if "[" in target.netloc else f"{target.scheme}://{target.netloc}"


def _html(page: Page, status: int = 200, form_targets: str = "") -> HTMLResponse:
    policy = (
        f"default-src 'none'; style-src 'nonce-{page.nonce}'; script-src 'nonce-{page.nonce}'; img-src data:; "
        f"form-action 'self' {form_targets}; frame-ancestors 'none'; base-uri 'none'"
    )
    return HTMLResponse(page.html, status, {**_HEADERS, "content-security-policy": policy})


def _cookie_name(root: str) -> str:
    return "__Host-tunesmith" if root.startswith("https:") else "tunesmith"


def _keep(response: Response, root: str, cookie: str, seconds: int | None = None) -> None:
    secure = root.startswith("https:")
    response.set_cookie(
        _cookie_name(root), cookie, max_age=seconds, path="/", secure=secure, httponly=True, samesite="lax"
    )
