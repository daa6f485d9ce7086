"""The pages on which people sign in and allow programs to use their account: one HTML file, and what differs."""

import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from string import Template

_COPY = """
const button = document.getElementById("copy");
button.hidden = false;
button.addEventListener("click", async () => {
  await navigator.clipboard.writeText(document.getElementById("line").textContent);
  button.textContent = "Copied";
});
"""


@dataclass(frozen=True)
class Page:
    """One page.

    Attributes:
        html: All of it.
        nonce: What its style and its script are marked with, and nothing that somebody smuggled in.
    """

    html: str
    nonce: str


@dataclass(frozen=True)
class App:
    """A program that was allowed something."""

    id: str
    name: str
    allows: Sequence[str]
    since: float
    used: float


def sign_in_page(token: str, where: str, email: str = "", wrong: str = "") -> Page:
    """Return the page that asks for a password.

    Args:
        token: Proves the form to be ours.
        where: The path to go on to.
        email: What was typed before, or what the program says it should be.
        wrong: What was wrong with that.
    """
    first, second = ("", " autofocus") if email else (" autofocus", "")
    return _page(
        "Sign in",
        f"""<h1>Sign in</h1>
<p class="soft">with your account on this server</p>
{_alert(wrong)}<form method="post" action="/signin">
{_hidden(token=token, where=where)}
<label for="email">E-mail address</label>
<input id="email" name="email" type="email" autocomplete="username" autocapitalize="none" spellcheck="false"
 required maxlength="320" value="{escape(email)}"{first}>
<label for="password">Password</label>
<input id="password" name="password" type="password" autocomplete="current-password" required
 maxlength="1024"{second}>
<button class="primary full">Sign in</button>
</form>""",
    )


def consent_page(
    token: str, action: str, where: str, *, client: str, account: str, allows: Iterable[str], answer_to: str
) -> Page:
    """Return the page that asks whether a program may use the account.

    Args:
        token: Proves the form to be ours.
        action: The path that the decision goes to.
        where: The path that shows this page again.
        client: What the program is called.
        account: Who is signed in.
        allows: What it asks for, in words.
        answer_to: Where it is told; empty for one that is told by pasting.
    """
    if answer_to:
        after = f"Your answer goes to <code>{escape(answer_to)}</code>, which is on the machine you use now."
    else:
        after = "You will be shown a line to paste into the terminal in which you started it."
    return _page(
        "Allow access",
        f"""<h1>{escape(client)} wants to use your account</h1>
{_who(token, account, where)}
<p>It will be able to:</p>
{_allowed(allows)}
<p class="soft">Allow this only if you have just started the program yourself. {after}</p>
<form method="post" action="{escape(action)}">
{_hidden(token=token)}
{_choice()}
</form>""",
    )


def paste_page(line: str, minutes: int) -> Page:
    """Return the page that shows what to paste into a terminal.

    Args:
        line: That.
        minutes: How long it is good.
    """
    return _page(
        "Paste this line",
        f"""<h1>Paste this line into your terminal</h1>
<p class="soft">The program there waits for it. It is good once, for {minutes} minutes; show it to nobody.</p>
<code class="line" id="line" tabindex="0">{escape(line)}</code>
<button class="primary full" id="copy" type="button" hidden>Copy</button>""",
        script=_COPY,
    )


def device_page(token: str, account: str, code: str = "", wrong: str = "") -> Page:
    """Return the page that asks for the code that another device shows."""
    return _page(
        "Connect a device",
        f"""<h1>Connect a device</h1>
<p class="soft">Type the code that the device, or the terminal, shows.</p>
{_who(token, account, "/device")}
{_alert(wrong)}<form method="post" action="/device">
{_hidden(token=token)}
<label for="code">Code</label>
<input class="code" id="code" name="code" autocomplete="off" autocapitalize="characters" spellcheck="false"
 placeholder="XXXX-XXXX" required maxlength="20" value="{escape(code)}" autofocus>
<button class="primary full">Continue</button>
</form>""",
    )


def device_consent_page(token: str, code: str, *, client: str, account: str, allows: Iterable[str]) -> Page:
    """Return the page that asks whether a device may use the account; arguments as for the pages above."""
    return _page(
        "Allow access",
        f"""<h1>{escape(client)} wants to use your account</h1>
{_who(token, account, "/device")}
<p>On the device that shows <code>{escape(code)}</code>, it will be able to:</p>
{_allowed(allows)}
<p class="soft">Allow this only if that device is yours and you started the program there. If somebody sent you the
code, deny it: they would use your account.</p>
<form method="post" action="/device">
{_hidden(token=token, code=code)}
{_choice()}
</form>""",
    )


def account_page(token: str, account: str, apps: Sequence[App]) -> Page:
    """Return the page that shows what an account allowed, and takes it back."""
    shown = "".join(
        f"""<li><div><h2>{escape(app.name)}</h2>
<p class="soft">{escape("; ".join(app.allows))}</p>
<p class="soft">since {_day(app.since)}, used {_day(app.used)}</p></div>
<form method="post" action="/account">{_hidden(token=token, app=app.id)}
<button aria-label="Take access from {escape(app.name)}">Remove</button></form></li>"""
        for app in apps
    )
    listed = f'<ul class="apps">{shown}</ul>' if apps else '<p class="soft">None.</p>'
    return _page(
        "Your account",
        f"""<h1>Your account</h1>
{_who(token, account, "/account", "Sign out")}
<h2>Programs that may use it</h2>
<p class="soft">Removing one ends its tokens at once. It can ask again.</p>
{listed}""",
        wide=True,
    )


def message_page(title: str, *lines: str) -> Page:
    """Return a page that only says something."""
    return _page(title, f"<h1>{escape(title)}</h1>{''.join(f'<p>{escape(line)}</p>' for line in lines)}")


def _page(title: str, content: str, *, script: str = "", wide: bool = False) -> Page:
    nonce = secrets.token_urlsafe(16)
    html = Template(files(__package__).joinpath("sign_in_page.html").read_text("utf-8")).substitute(
        title=escape(title),
        nonce=nonce,
        content=content,
        wide=' class="wide"' if wide else "",
        script=f'<script nonce="{nonce}">{script}</script>' if script else "",
    )
    return Page(html, nonce)


def _who(token: str, account: str, where: str, leave: str = "Not you?") -> str:
    return f"""<div class="who"><span>{escape(account)}</span><form method="post" action="/signout">
{_hidden(token=token, where=where)}<button class="link">{leave}</button></form></div>"""


def _choice() -> str:
    return """<div class="choice"><button name="decision" value="deny">Deny</button>
<button class="primary" name="decision" value="allow">Allow</button></div>"""


def _allowed(allows: Iterable[str]) -> str:
    return f'<ul class="allows">{"".join(f"<li>{escape(line)}</li>" for line in allows)}</ul>'


def _alert(wrong: str) -> str:
    return f'<p class="wrong" role="alert">{escape(wrong)}</p>\n' if wrong else ""


def _hidden(**fields: str) -> str:
    return "".join(
        f'<input type="hidden" name="{name}" value="{escape(value)}">' for name, value in fields.items()
    )


def _day(seconds: float) -> str:
    day = time.gmtime(seconds)
    return f"{day.tm_mday} {time.strftime('%B %Y', day)}"
