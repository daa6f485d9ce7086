"""TLS on both ports, with a certificate as an operator would bring it, and Google's client as people have it."""

import json
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from servers import FREE_PORTS, Server, command, job

# What people's code does: the default transport, a host and port, a key; the environment names the CA.
UNMODIFIED = """
import json, sys
from google.ai import generativelanguage_v1beta as google
from google.api_core.client_options import ClientOptions
from google.api_core.exceptions import NotFound

options = ClientOptions(api_endpoint=sys.argv[1], api_key=sys.argv[2])
models = google.ModelServiceClient(client_options=options)
answers = google.GenerativeServiceClient(client_options=options)
request = {"tuned_model": json.loads(sys.argv[3]), "tuned_model_id": "over-tls"}
operation = models.create_tuned_model(request)
print(operation.metadata.tuned_model)
print(operation.result(timeout=60).state.name)
contents = [{"role": "user", "parts": [{"text": "1"}]}]
request = {"model": "tunedModels/over-tls", "contents": contents, "generation_config": {"max_output_tokens": 4}}
print(sum(1 for part in answers.stream_generate_content(request)) > 0)
models.delete_tuned_model(name="tunedModels/over-tls")
try:
    models.get_tuned_model(name="tunedModels/over-tls")
except NotFound as error:
    print(error.message)
"""


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `tunesmith certificate` makes it: ca.pem, and server.pem and server.key for this machine."""
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run([*command("certificate"), "--output", str(folder)], check=True, capture_output=True)
    return folder


def tls_options(certificates: Path) -> tuple[str, ...]:
    return (
        *("--ssl-certfile", str(certificates / "server.pem")),
        *("--ssl-keyfile", str(certificates / "server.key")),
    )


@pytest.fixture(scope="module")
def server(tiny: dict[str, str], certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    data = tmp_path_factory.mktemp("data")
    with Server(data, tiny, *tls_options(certificates), ca=certificates / "ca.pem") as running:
        yield running


def test_google_s_client_as_it_comes(server: Server, certificates: Path):
    key = server.run("api-key", "create", "admin@localhost").strip()
    address = f"localhost:{server.grpc.rpartition(':')[2]}"
    done = subprocess.run(
        [sys.executable, "-c", UNMODIFIED, address, key, json.dumps(job())],
        env={**server.environment, "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(certificates / "ca.pem")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.splitlines() == [
        "tunedModels/over-tls",
        "ACTIVE",
        "True",
        "Tuned model tunedModels/over-tls does not exist.",
    ], done.stderr


def test_rest_is_served_over_tls_too(server: Server):
    assert server.url.startswith("https://")
    assert server.call("GET", "models")["models"]
    with pytest.raises(httpx2.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx2.get(server.url + "/healthz", verify=ssl.create_default_context())
    with pytest.raises(httpx2.TransportError):
        httpx2.get(server.url.replace("https:", "http:") + "/healthz")


def test_grpc_is_not_served_without_tls(server: Server, certificates: Path):
    ca = grpc.ssl_channel_credentials((certificates / "ca.pem").read_bytes())
    request = health_pb2.HealthCheckRequest()
    with grpc.secure_channel(server.grpc, ca) as channel:
        assert health_pb2_grpc.HealthStub(channel).Check(request, timeout=20, wait_for_ready=True)
    with grpc.insecure_channel(server.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        health_pb2_grpc.HealthStub(channel).Check(request, timeout=20)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.UNAVAILABLE


def test_a_certificate_needs_its_key(server: Server, certificates: Path, tmp_path: Path):
    other = Server(tmp_path / "data", server.environment)
    certificate, key = tls_options(certificates)[:2], tls_options(certificates)[2:]
    for options, reason in (
        (certificate, "ssl_certfile and ssl_keyfile go together: set both, or neither"),
        ((*certificate, "--ssl-keyfile", str(tmp_path / "none.key")), "none.key"),
        ((*key, "--ssl-certfile", key[1]), "are not a certificate in PEM and its unencrypted key"),
    ):
        error = other.run("serve", *FREE_PORTS, *options, code=1)
        assert reason in error
        assert "Traceback" not in error


def test_a_taken_grpc_port_is_a_line_not_a_traceback(server: Server, tmp_path: Path):
    other = Server(tmp_path / "data", server.environment)
    port = server.grpc.rpartition(":")[2]
    error = other.run("serve", "--port", "0", "--grpc-port", port, code=1)
    assert f"cannot listen on 127.0.0.1:{port} for gRPC: choose another --grpc-port" in error
    assert "Traceback" not in error
