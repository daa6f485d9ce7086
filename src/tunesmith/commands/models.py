"""Tuned models: listing, asking, taking them away."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from tunesmith.commands.options import DataDir, Token, Url, full_name
from tunesmith.commands.reach import client_of
from tunesmith.commands.screen import console, say
from tunesmith.config import Settings


def models(url: Url = None, token: Token = None, data_dir: DataDir = None) -> None:
    """List the tuned models that are yours or shared with you."""
    from tunesmith.terminal import tuned_models_table

    with client_of(url, token, Settings.load(data_dir=data_dir)) as client:
        found = list(client.tuned_models())
    console.print(tuned_models_table(found) if found else "No tuned models yet. Make one: tunesmith tune FILE.csv")


def generate(
    model: Annotated[str, typer.Argument(help="tunedModels/… or models/….")],
    text: Annotated[str, typer.Argument(help="What to ask; - reads standard input.")],
    temperature: Annotated[float | None, typer.Option(help="0 is repeatable; default: the model's.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="End the answer after so many tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answer.")] = None,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
) -> None:
    """Ask a model."""
    given = {"temperature": temperature, "maxOutputTokens": max_tokens, "seed": seed}
    config = {key: value for key, value in given.items() if value is not None}
    with client_of(url, token, Settings.load(data_dir=data_dir)) as client:
        print(client.generate(full_name(model), sys.stdin.read() if text == "-" else text, config))


def export(
    model: Annotated[str, typer.Argument(help="tunedModels/….")],
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="gguf for llama.cpp, ollama, safetensors for transformers and vLLM, peft for the adapter alone.",
        ),
    ] = "gguf",
    quantization: Annotated[
        str, typer.Option(help="Of gguf and ollama: f16, which is the default, f32, bf16 or q8_0.")
    ] = "",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file or folder to write; default: here.")
    ] = None,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
) -> None:
    """Fetch a tuned model as a file that other programs load."""
    from tunesmith.terminal import download_bar

    given = {"format": format_, **({"quantization": quantization} if quantization else {})}
    client = client_of(url, token, Settings.load(data_dir=data_dir))
    with client, download_bar(console, "Fetching") as show:
        file = client.download(f"{full_name(model)}:export", out, show, **given)
    say(f"{file} is written.")
