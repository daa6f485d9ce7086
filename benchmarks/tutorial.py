"""Seconds from POST to ACTIVE for the tutorial's job: 15 examples, batch 4, 5 epochs, worker warm.

Run on an otherwise idle machine: python benchmarks/tutorial.py [RUNS]
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from tunesmith import demo
from tunesmith.app import FIRST_ACCOUNT, Parts
from tunesmith.auth.tokens import DEFAULT_SCOPES
from tunesmith.base_models.catalog import Catalog
from tunesmith.client import Client
from tunesmith.config import Settings
from tunesmith.terminal import fetch_weights

POLL_SECONDS = 0.1


def main(runs: int) -> None:
    """Print each run and the median."""
    median = statistics.median(seconds(runs))
    print(f"median of {runs}: {median:.2f} s (goal: at most 4 s on 2 idle cores)")


def seconds(runs: int) -> list[float]:
    """Print and return the seconds from POST to ACTIVE of each run, on a server of our own."""
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings.load(data_dir=Path(folder))
        fetch_weights(Console(stderr=True), Catalog.load(settings).default, settings.cache_dir)
        with demo.server(settings) as url:
            token = Parts.open(settings).tokens.create(FIRST_ACCOUNT, DEFAULT_SCOPES, seconds=3600)
            with Client(url, token) as client:
                once(client)  # the worker starts, loads and warms up
                for run in range(runs):
                    taken.append(once(client))
                    print(f"run {run + 1}: POST to ACTIVE {taken[-1]:.2f} s", flush=True)
    return taken


def once(client: Client, body: dict[str, Any] = demo.TUNED_MODEL) -> float:
    """Tune once; return the seconds from the request to the first GET that says ACTIVE."""
    start = time.perf_counter()
    model = client.tune(body)["metadata"]["tunedModel"]
    while (state := client.call("GET", model)["state"]) == "CREATING":
        time.sleep(POLL_SECONDS)
    if state != "ACTIVE":
        raise SystemExit(f"{model} is {state}")
    return time.perf_counter() - start


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
