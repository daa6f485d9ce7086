"""Options that several commands have."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.config import Settings


def setting(field: str, *names: str) -> Any:
    """An option that stands for a setting: help, environment variable and default come from the setting."""
    about = Settings.model_fields[field]
    default = about.get_default(call_default_factory=True, validated_data={})
    return typer.Option(
        *(names or (f"--{field.replace('_', '-')}",)),
        help=about.description,
        envvar=f"TUNESMITH_{field.upper()}",
        show_default=str(default),
    )


DataDir = Annotated[Path | None, setting("data_dir")]
CacheDir = Annotated[Path | None, setting("cache_dir")]
Device = Annotated[str | None, setting("device")]
Threads = Annotated[int | None, setting("threads")]
LogLevel = Annotated[str | None, setting("log_level")]
Url = Annotated[
    str | None,
    typer.Option(
        envvar="TUNESMITH_URL",
        help="The server; left out, the one this machine signed in to last, or http://127.0.0.1:8080.",
    ),
]
CaFile = Annotated[
    Path | None,
    typer.Option(
        help="The authority that signed the server's certificate, in PEM, when this machine does not trust it.",
        exists=True,
        dir_okay=False,
        resolve_path=True,
    ),
]
Token = Annotated[
    str | None,
    typer.Option(
        envvar="TUNESMITH_TOKEN",
        help="An access token; left out, that of tunesmith login, or one made from the server's data dir.",
    ),
]
Model = Annotated[str, typer.Argument(help="tunedModels/…, or what comes after the slash.")]


def full_name(model: str) -> str:
    """Return a tuned model's name, also of one that was given by its id alone."""
    return model if "/" in model else f"tunedModels/{model}"
