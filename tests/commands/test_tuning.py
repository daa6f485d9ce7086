"""tune, watch, report, pause, resume and cancel as a person types them, in a terminal and in a pipe."""

import itertools
import json
import os
import pty
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from servers import Server, command, job

EVERY_STEP = {"TUNESMITH_CHECKPOINT_SECONDS": "0"}
LONG = "900"  # epochs: more than a test waits for
COLUMNS = 80

numbers = itertools.count(1)


@pytest.fixture(scope="module")
def server(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of its own: its one worker must be free for these jobs."""
    with Server(tmp_path_factory.mktemp("commands"), tiny | EVERY_STEP) as running:
        yield running


@pytest.fixture(autouse=True)
def idle(server: Server) -> Iterator[None]:
    """No job is left to the next test, whatever becomes of one."""
    yield
    for model in server.call("GET", "tunedModels").get("tunedModels", []):
        if model["state"] == "CREATING":
            server.call("POST", f"{model['name']}:cancel", {})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Sixty examples, of which line 62 contradicts line 2."""
    rows = [f"{n},{n + 1}" for n in range(1, 61)]
    file = tmp_path / "numbers.csv"
    file.write_text("\n".join(["text_input,output", *rows, "1,7"]))
    return file


def tune(file: Path, *options: str, name: str | None = None) -> list[str]:
    return ["tune", str(file), "--base", "tiny-gemma3", "--id", name or f"typed-{next(numbers)}", *options]


@contextmanager
def begun(server: Server, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command that runs with a pipe for its output; ended by the test or with the block."""
    arguments = (*command(*arguments), *server.where(), "--url", server.url)
    with subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        text=True,
        env=server.environment,
        preexec_fn=interruptible,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def interruptible() -> None:
    """Let Ctrl-C end the command, also where the tests run in the background of a shell, which turns it off."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def lines(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stdout is not None
    yield from process.stdout


def on_terminal(server: Server, *arguments: str) -> str:
    """Run a command on a terminal of 80 columns; return all that it drew, without colours."""
    leader, follower = pty.openpty()
    environment = {**server.environment, "COLUMNS": str(COLUMNS), "TERM": "xterm"}
    process = subprocess.Popen(
        [*command(*arguments), *server.where(), "--url", server.url],
        stdout=follower,
        stderr=follower,
        stdin=follower,
        env=environment,
    )
    os.close(follower)
    drawn = b""
    with process, os.fdopen(leader, "rb", buffering=0) as screen:
        while True:
            try:
                part = screen.read(65536)
            except OSError:  # Linux says so that the other end is closed
                break
            if not part:
                break
            drawn += part
    assert process.returncode == 0, drawn.decode()
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", drawn.decode())


def test_options_warnings_and_progress_in_a_pipe(server: Server, file: Path) -> None:
    options = ["--epochs", "3", "--validation", "0.2", "--patience", "3", "--keep", "last", "--seed", "7"]
    shown = server.run(*tune(file, *options, name="piped"), "--url", server.url)
    assert "Tuning tunedModels/piped on 61 examples of numbers.csv" in shown
    assert "! Line 2 and line 62 give different outputs for the same input" in shown
    assert re.search(r"step \d+/\d+ · loss \d\.\d+ · validation \d\.\d+ · [\d,]+ tokens/s", shown)
    assert re.search(r"epoch 1 · validation loss \d\.\d+ · right: \d+% of tokens, \d+% of answers", shown)
    assert "tunesmith generate tunedModels/piped" in shown
    report = json.loads(server.run("report", "piped", "--json", "--url", server.url))
    assert report["options"] == {
        "validationFraction": pytest.approx(0.2),
        "patience": 3,
        "keep": "LAST",
        "seed": 7,
    }
    assert len(report["recipe"]["heldOutRows"]) == 12
    again = server.run("watch", "piped", "--url", server.url)
    assert "! Example 1 and example 61 give different outputs" in again
    assert "tunedModels/piped is ACTIVE" in again
    page = server.run("report", "tunedModels/piped", "--url", server.url)
    for words in (
        "tunedModels/piped  ACTIVE",
        "49 learnt, 12 held out",
        "3 epochs, batch size 4, learning rate 0.001, 20% held out, patience 3, keep last",
        "! Example 1 and example 61",
        "← kept",
        "tokens/s",
        "right to the letter:",
    ):
        assert words in page


def test_a_terminal_gets_a_bar(server: Server, file: Path) -> None:
    drawn = on_terminal(server, *tune(file, "--epochs", "2", name="drawn"))
    assert "Tuned ━" in drawn
    assert re.search(r"100% step \d+/\d+", drawn)
    assert re.search(r"loss \d\.\d+ · validation \d\.\d+ · [\d,]+ tokens/s", drawn)
    assert "tunedModels/drawn is ACTIVE" in drawn
    page = on_terminal(server, "report", "drawn")
    assert "EXPECTED" in page
    assert max(map(len, re.split(r"[\r\n]+", page))) <= COLUMNS


def test_ctrl_c_leaves_the_job_running_then_it_rests_and_ends(server: Server, file: Path) -> None:
    url = ["--url", server.url]
    with begun(server, *tune(file, "--epochs", LONG, name="long")) as process:
        printed = lines(process)
        assert any(line.startswith("epoch 1") for line in printed)
        process.send_signal(signal.SIGINT)
        told = "".join(printed)
        assert process.wait() == 130, told
    assert "tunedModels/long goes on without you" in told
    assert "tunesmith watch tunedModels/long" in told
    assert "is being tuned, step" in server.run("report", "long", *url)
    waiting = server.run(*tune(file, "--detach", name="waits"), *url)
    assert "tunesmith watch tunedModels/waits" in waiting
    assert "waits for a worker" in server.run("report", "waits", *url)
    assert "is paused after step 0 of" in server.run("pause", "waits", *url)
    assert "tunesmith resume tunedModels/long" in server.run("pause", "long", *url)
    with begun(server, "watch", "long") as process:
        assert any(line.startswith("Paused after step") for line in lines(process))
    assert "is paused, step" in server.run("report", "long", *url)
    assert "tunesmith watch tunedModels/long" in server.run("resume", "long", *url)
    assert "ends after the step" in server.run("cancel", "long", *url)
    assert "The operation was cancelled after step" in server.run("watch", "long", *url)
    assert "is ACTIVE already" in server.run("cancel", "long", *url)
    assert "Cancelled tunedModels/waits." in server.run("cancel", "waits", *url)
    failed = server.run("watch", "waits", *url, code=1)
    assert "tunedModels/waits is FAILED: The operation was cancelled before tuning began." in failed
    assert "nothing to pause" in server.run("pause", "long", *url, code=1)


def test_a_refusal_speaks_of_lines_and_options(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "bad.csv"
    file.write_text('text_input,output\n1,2\n\n"a\nb",\n')
    options = ["--batch-size", "-1", "--patience", "2"]
    error = server.run(*tune(file, *options), "--url", server.url, code=1)
    assert "--batch-size: must be between" in error
    assert "--patience: needs examples that are held out: give a --validation above 0" in error
    assert "line 4, output: output is empty" in error
    assert "TuneModelRequest" not in error


def test_an_early_end_is_explained(server: Server, file: Path) -> None:
    shown = server.run(
        *tune(file, "--epochs", LONG, "--patience", "1", "--learning-rate", "0.02"), "--url", server.url
    )
    assert "validation got no better" in shown
    best = re.findall(r"epoch (\d+) .* · best\n", shown)[-1]
    assert f"It has the weights after epoch {best}, with the lowest validation loss." in shown
    assert "is ACTIVE" in shown


def test_a_watch_goes_on_where_it_was_when_the_server_comes_back(tiny: dict[str, str], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with Server(tmp_path / "data", tiny | EVERY_STEP, "--port", port) as server:
        name = server.tune(job(epochs=60), tunedModelId="cut")["metadata"]["tunedModel"]
        with begun(server, "watch", name, "--json") as process, begun(server, "watch", name) as beside:
            told: list[dict[str, Any]] = []
            printed = map(json.loads, lines(process))
            for event in printed:
                told.append(event)
                if event.get("step", {}).get("step", 0) >= 10:
                    break
            server.kill()
            shown = lines(beside)
            assert any("the server does not answer; trying again" in line for line in shown)
            server.start()
            told += printed
            assert process.wait() == 0
            rest = "".join(shown)
            assert beside.wait() == 0
        kept = [event for event in told if "eventId" in event]
        assert [event["eventId"] for event in kept] == list(range(1, len(kept) + 1))
        steps = [event["step"]["step"] for event in kept if "step" in event]
        assert steps == list(range(1, len(steps) + 1))
        assert told[-1]["finished"]["state"] == "ACTIVE"
        assert re.search("attempt 2 goes on from the last checkpoint", rest)


def test_a_stream_that_speaks_of_a_deleted_model_ends(server: Server, file: Path) -> None:
    server.run(*tune(file, "--epochs", LONG, "--detach", name="gone"), "--url", server.url)
    with begun(server, "watch", "gone", "--json") as process:
        printed = lines(process)
        assert any('"step"' in line for line in printed)
        server.call("DELETE", "tunedModels/gone")
        for _ in printed:
            pass
        assert process.wait() == 1
