"""What callers show: access tokens and API keys."""

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.commands.options import DataDir
from tunesmith.commands.reach import administering, open_parts
from tunesmith.commands.times import seconds_in

if TYPE_CHECKING:
    from tunesmith.store.tables import ApiKey

api_key = typer.Typer(help="API keys, shown once when they are made.", no_args_is_help=True)


def token(
    email: Annotated[str, typer.Argument(help="The account.")],
    scopes: Annotated[
        str, typer.Option(help="Google's OAuth scopes, separated by commas; default: what the tutorial asks for.")
    ] = "",
    ttl: Annotated[str, typer.Option(help="How long it is good: 90s, 30m, 1h, 7d.")] = "1h",
    data_dir: DataDir = None,
) -> None:
    """Print an access token for an account."""
    from tunesmith.auth.scopes import known_scope
    from tunesmith.auth.tokens import DEFAULT_SCOPES

    asked = [known_scope(scope) for scope in scopes.split(",") if scope.strip()] or DEFAULT_SCOPES
    seconds = seconds_in(ttl)
    with administering(data_dir, "IssueToken", f"accounts/{email}", f"good for {ttl}") as parts:
        print(parts.tokens.create(email, asked, seconds))


@api_key.command("create")
def create_key(
    email: str,
    name: Annotated[str, typer.Option(help="What to call it, such as the program that uses it.")] = "",
    expires: Annotated[
        str, typer.Option(help="How long it is good: 12h, 90d; left out, until it is revoked.")
    ] = "",
    scopes: Annotated[
        str,
        typer.Option(
            help="All that it may do, separated by commas, such as generative-language.tuning.readonly; left "
            "out, all that the account may."
        ),
    ] = "",
    data_dir: DataDir = None,
) -> None:
    """Make an API key and print it, this once."""
    seconds = seconds_in(expires, "--expires") if expires else None
    asked = [scope for scope in scopes.split(",") if scope.strip()]
    with administering(data_dir, "CreateApiKey", f"accounts/{email}") as parts:
        key_id, key = parts.keys.create(email, name, seconds, asked)
    print(key)
    print(f"Key {key_id} of {email}; it is not shown again.", file=sys.stderr)


@api_key.command("list")
def list_keys(email: str, data_dir: DataDir = None) -> None:
    """List an account's keys: id, name, when they were made and last used, when they end, what they may do."""
    for key in open_parts(data_dir).keys.list(email):
        print(_described(key))


@api_key.command("revoke")
def revoke_key(key_id: str, data_dir: DataDir = None) -> None:
    """Refuse a key from now on."""
    with administering(data_dir, "RevokeApiKey", f"apiKeys/{key_id}") as parts:
        parts.keys.revoke(key_id)
    print(f"Revoked {key_id}.")


def _described(key: "ApiKey") -> str:
    from tunesmith.auth.scopes import AUTH

    def moment(seconds: float) -> str:
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))

    facts = [key.id, key.name or "-", f"made {moment(key.create_time)}"]
    facts.append(f"last used {moment(key.last_use_time)}" if key.last_use_time else "never used")
    if key.expire_time is not None:
        past = key.expire_time <= time.time()
        facts.append(f"{'expired' if past else 'expires'} {moment(key.expire_time)}")
    if key.scopes:
        facts.append(f"only {', '.join(scope.removeprefix(AUTH) for scope in key.scopes.split())}")
    if key.revoked:
        facts.append("revoked")
    return "  ".join(facts)
