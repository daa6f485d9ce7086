"""The commands as a person types them, against a running server on the tiny model."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from servers import EXAMPLES, Server, job

ADA = "ada@example.com"


def test_the_first_account_and_its_password_file(server: Server) -> None:
    file = server.data_dir / "first-account.txt"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(server.data_dir.stat().st_mode) == 0o700
    email, password = file.read_text().split()
    assert email == "admin@localhost"
    assert len(password) >= 16
    assert "admin@localhost" in server.run("accounts", "list")


def test_accounts_tokens_and_keys(server: Server) -> None:
    assert "tunesmith token ada@example.com" in server.run("accounts", "create", ADA)
    assert "already" in server.run("accounts", "create", ADA, code=1)
    token = server.run("token", ADA, "--ttl", "5m", "--scopes", "generative-language.tuning.readonly").strip()
    assert server.call("GET", "tunedModels", headers={"authorization": f"Bearer {token}"}) == {}
    key = server.run("api-key", "create", ADA).strip()
    as_ada = {"authorization": "", "x-goog-api-key": key}
    assert server.call("GET", "tunedModels", headers=as_ada) == {}
    assert server.http.get(f"/v1beta/tunedModels?key={key}", headers={"authorization": ""}).json() == {}
    key_id = server.run("api-key", "list", ADA).split()[0]
    server.run("api-key", "revoke", key_id)
    assert "revoked" in server.run("api-key", "list", ADA)
    server.call("GET", "tunedModels", headers=as_ada, code=400)
    server.run("accounts", "disable", ADA)
    server.call("GET", "tunedModels", headers={"authorization": f"Bearer {token}"}, code=401)
    assert server.run("token", "nobody@example.com", code=1).startswith("tunesmith: There is no account")
    assert "--ttl 5x" in server.run("token", ADA, "--ttl", "5x", code=1)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
def test_tune_models_generate(server: Server, tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"numbers.{kind}"
    if kind == "csv":
        lines = [f'"{row["text_input"]}",{row["output"]}' for row in EXAMPLES]
        file.write_text("\n".join(["\ufefftext_input,output", *lines]), "utf-8")  # with the mark that Excel writes
    elif kind == "jsonl":
        file.write_text(
            "\n".join(json.dumps({"prompt": r["text_input"], "completion": r["output"]}) for r in EXAMPLES)
        )
    else:
        file.write_text(json.dumps(EXAMPLES))
    url = ["--url", server.url]
    shown = server.run("tune", str(file), "--base", "tiny-gemma3", "--epochs", "3", "--id", f"from-{kind}", *url)
    assert "step 8/8" in shown
    assert "loss └" in shown
    assert f"tunedModels/from-{kind} is ACTIVE" in shown
    assert f"tunedModels/from-{kind}" in server.run("models", *url)
    asked = ["generate", f"from-{kind}", "1", "--max-tokens", "4", *url]
    assert server.run(*asked) == server.run(*asked)
    assert "already exists" in server.run(
        "tune", str(file), "--base", "tiny-gemma3", "--id", f"from-{kind}", *url, code=1
    )


def test_the_servers_words_reach_the_terminal(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "bad.csv"
    file.write_text("text_input,output\n1,2\n3,\n")
    error = server.run("tune", str(file), "--base", "tiny-gemma3", "--url", server.url, code=1)
    assert "line 3, output: output is empty" in error
    assert "Traceback" not in error
    file.write_text("question,answer\n1,2\n")
    assert "line 2: needs text_input and output, has question, answer" in server.run("tune", str(file), code=1)
    file.write_text("text_input,output\n1,2\n")
    assert "tunesmith serve" in server.run("tune", str(file), "--url", "http://127.0.0.1:1", code=1)


def test_a_credential_from_the_environment(server: Server, tmp_path: Path) -> None:
    key = server.run("api-key", "create", "admin@localhost").strip()
    # A machine without the server's data dir.
    elsewhere = Server(tmp_path / "absent", {})
    assert "No credential" in elsewhere.run("models", "--url", server.url, code=1)
    elsewhere.environment["TUNESMITH_API_KEY"] = "tsk_wrong"
    assert "API key not valid" in elsewhere.run("models", "--url", server.url, code=1)
    elsewhere.environment["TUNESMITH_API_KEY"] = key
    elsewhere.run("models", "--url", server.url)


def test_doctor(server: Server) -> None:
    report = server.run("doctor")
    assert "precision" in report
    assert "models/tiny-gemma3" in report
    assert "tunesmith doctor --fetch smollm2-135m-instruct" in " ".join(report.split())


def test_health_needs_no_credentials(server: Server) -> None:
    nobody = {"authorization": ""}
    assert server.http.get("/healthz", headers=nobody).json() == {"status": "ok"}
    assert server.http.get("/readyz", headers=nobody).status_code == 200
    assert "tunesmith_calls_total" in server.http.get("/metrics", headers=nobody).text


def test_a_taken_port_is_a_line_not_a_traceback(server: Server, tmp_path: Path) -> None:
    other = Server(tmp_path / "other", server.environment)
    error = other.run("serve", "--port", server.url.rpartition(":")[2], code=1)
    assert "Address already in use" in error
    assert "Traceback" not in error


def test_generate_before_and_after(server: Server) -> None:
    """A model that is not ready names its state; a failed one its reason."""
    body = {"contents": [{"parts": [{"text": "1"}]}]}
    first = server.tune(job("long", epochs=200))
    second = server.tune(job("waits", epochs=1))
    name = second["metadata"]["tunedModel"]
    error = server.call("POST", f"{name}:generateContent", body, code=400)["error"]
    assert error["status"] == "FAILED_PRECONDITION"
    assert "is in state CREATING" in error["message"]
    assert server.call("POST", f"{second['name']}:cancel", {}) == {}
    done = server.finished(second)
    assert done["error"] == {"code": 1, "message": "The operation was cancelled before tuning began."}
    assert server.call("GET", name)["state"] == "FAILED"
    error = server.call("POST", f"{name}:generateContent", body, code=400)["error"]
    assert "is in state FAILED: The operation was cancelled before tuning began." in error["message"]
    server.call("POST", f"{first['name']}:cancel", {})
    server.finished(first)


@pytest.mark.parametrize(
    ("command", "inherited", "spins"),
    [
        ("serve", None, "3000"),
        ("worker", None, "20000"),
        ("worker", "3000", "20000"),  # a server's own number, which its workers inherit
        ("worker", "7", "7"),
        ("serve", "7", "7"),
    ],
)
def test_threads_look_for_each_other_as_often_as_is_good(command: str, inherited: str | None, spins: str) -> None:
    ask = (
        "import os, sys\nfrom tunesmith import cli\n"
        f"sys.argv = ['tunesmith', {command!r}, '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    print('\\n' + os.environ['GOMP_SPINCOUNT'])"
    )
    environment = {**os.environ, "GLIBC_TUNABLES": "", "GOMP_SPINCOUNT": inherited or ""}
    if inherited is None:
        del environment["GOMP_SPINCOUNT"]
    said = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[-1] == spins
