"""A browser without a screen: loads pages, fills in their forms, keeps cookies, follows nothing by itself."""

import ssl
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx2


@dataclass
class Form:
    """A form of a page."""

    action: str
    fields: dict[str, str] = field(default_factory=dict)


class Page(HTMLParser):
    """A page that was loaded."""

    def __init__(self, response: httpx2.Response) -> None:
        super().__init__()
        self.response, self.status = response, response.status_code
        self.location = response.headers.get("location", "")
        self.forms: list[Form] = []
        self.line, self._words, self._open = "", "", ""
        self.feed(response.text)
        self.text = " ".join(self._words.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "form":
            self.forms.append(Form(given["action"]))
        elif tag == "input":
            self.forms[-1].fields[given["name"]] = given.get("value", "")
        self._open = given.get("id") or tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open not in ("style", "script"):
            self._words += f" {data}"
        if self._open == "line":
            self.line += data

    def form(self, action: str) -> Form:
        """The form whose action begins so."""
        return next(form for form in self.forms if form.action.startswith(action))

    @property
    def told(self) -> dict[str, str]:
        """What a redirect tells the program that it leads to."""
        return dict(parse_qsl(urlsplit(self.location).query))


class Browser:
    """A browser at one server."""

    def __init__(self, root: str, verify: ssl.SSLContext | bool = True) -> None:
        self.root = root
        self.http = httpx2.Client(base_url=root, verify=verify, timeout=60)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def open(self, address: str) -> Page:
        return Page(self.http.get(address))

    def post(self, action: str, fields: dict[str, str], **headers: str) -> Page:
        """Send a form as a browser does, or with other headers."""
        sent: dict[str, Any] = {"origin": self.root, **{name.replace("_", "-"): headers[name] for name in headers}}
        return Page(self.http.post(action, data=fields, headers={k: v for k, v in sent.items() if v}))

    def submit(self, form: Form, **fields: str) -> Page:
        return self.post(form.action, {**form.fields, **fields})

    def sign_in(self, page: Page, email: str, password: str) -> Page:
        """Sign in on a page that asks for it, and load the page that comes then."""
        answer = self.submit(page.form("/signin"), email=email, password=password)
        return self.open(answer.location) if answer.status == 303 else answer

    def allow(self, address: str, email: str, password: str, decision: str = "allow") -> Page:
        """Go all the way from a program's question to its answer."""
        page = self.open(address)
        if page.status == 200 and any(form.action == "/signin" for form in page.forms):
            page = self.sign_in(page, email, password)
        return self.submit(page.form("/o/oauth2/"), decision=decision)
