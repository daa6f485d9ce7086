"""The table of all commands. Heavy imports happen inside a command, so that help and errors come at once."""

import os
import sys
from collections.abc import Callable

import typer

from tunesmith.commands import credentials, models, people, programs, record, serving, sign_in, tuning

COMMANDS: dict[str, dict[str, Callable[..., None] | typer.Typer]] = {
    "Servers": {
        "serve": serving.serve,
        "worker": serving.worker,
        "demo": serving.demo,
        "doctor": serving.doctor,
        "certificate": serving.certificate,
    },
    "Tuning": {
        "tune": tuning.tune,
        "watch": tuning.watch,
        "report": tuning.report,
        "pause": tuning.pause,
        "resume": tuning.resume,
        "cancel": tuning.cancel,
    },
    "Tuned models": {
        "models": models.models,
        "generate": models.generate,
        "export": models.export,
    },
    "Signing this machine in": {
        "login": sign_in.login,
        "logout": sign_in.logout,
    },
    "Who may call, on the server's machine": {
        "accounts": people.accounts,
        "token": credentials.token,
        "api-key": credentials.api_key,
        "client-secret": programs.client_secret,
        "clients": programs.clients,
        "service-account": programs.service_account,
        "keys": programs.keys,
        "groups": people.groups,
        "projects": people.projects,
        "audit": record.audit,
    },
}
"""Each with its name, under the headings that the help shows."""

app = typer.Typer(
    help="A self-hosted tuning service that speaks the Gemini API's tunedModels protocol.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for heading, group in COMMANDS.items():
    for name, command in group.items():
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name, rich_help_panel=heading)
        else:
            app.command(name, rich_help_panel=heading)(command)


ALLOCATOR = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {
        "hugetlb": 1,
        "mmap_threshold": 256 << 20,
        "trim_threshold": 1 << 30,
        "top_pad": 64 << 20,
    }.items()
)
"""Memory that a training step has freed stays with the process, for the next one, and lies in large pages: a step
takes a quarter less time than with tens of thousands of page faults."""


TRAINING_SPINS, SERVING_SPINS = "20000", "3000"
"""How often OpenMP's threads look for each other before they sleep; read when torch is loaded. By default so often
that a step takes fifty times as long where another process wants a core too. A worker is slower with a smaller
number; a server is not, and beside a worker that it does not outrank, as in another container, it is three times
as fast."""


def main() -> None:
    """Run a command; an expected error is a line, not a traceback."""
    os.environ["GOMP_SPINCOUNT"] = _spins()
    os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' own progress bars; ours are shown
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = ALLOCATOR  # for the processes started here
        if sys.argv[1:2] == ["worker"]:  # the allocator reads it when a process begins: begin once more
            os.execv(sys.executable, sys.orig_argv)  # noqa: S606 # nosec B606
    try:
        app()
    except SystemExit:  # how commands end: asking below what else it may be would import a lot
        raise
    except _expected() as error:
        print(f"tunesmith: {error}", file=sys.stderr)
        sys.exit(1)


def _spins() -> str:
    """Return what the person said, or else what is best for the command."""
    asked = os.environ.get("GOMP_SPINCOUNT", SERVING_SPINS)
    # A server's workers have inherited its own.
    return TRAINING_SPINS if sys.argv[1:2] == ["worker"] and asked == SERVING_SPINS else asked


def _expected() -> tuple[type[Exception], ...]:
    """Return the errors whose messages are for the person who typed the command."""
    from tunesmith.client import ClientError
    from tunesmith.errors import ApiError

    return ApiError, ClientError, ValueError, OSError
