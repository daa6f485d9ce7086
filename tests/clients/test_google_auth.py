"""google-auth and google-auth-oauthlib as people have them, over https, in an environment with nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from joserfc import jwt
from joserfc.jwk import KeySet

from oauth_client import Program
from secure_site import EMAIL, Site
from servers import job

WAIT = 120  # seconds

INSTALLED_APP = """
import sys, json
from google_auth_oauthlib.flow import InstalledAppFlow
from google.auth.transport.requests import AuthorizedSession, Request

file, address = sys.argv[1:]
auth = "https://www.googleapis.com/auth/"
scopes = [f"{auth}cloud-platform", f"{auth}generative-language.tuning"]
credentials = InstalledAppFlow.from_client_secrets_file(file, scopes).run_local_server(port=0)
session = AuthorizedSession(credentials)
print(session.get(f"{address}/v1beta/tunedModels").status_code)
old = credentials.token
credentials.refresh(Request())
print(credentials.token != old, session.get(f"{address}/v1beta/tunedModels").status_code)
"""

DEFAULT = """
import sys, datetime
import google.auth
from google.auth.transport.requests import AuthorizedSession

address = sys.argv[1]
credentials, project = google.auth.default(quota_project_id="my-project-id")
session = AuthorizedSession(credentials)
print(session.get(f"{address}/v1beta/tunedModels").status_code)
old, credentials.expiry = credentials.token, datetime.datetime(2020, 1, 1)
print(session.get(f"{address}/v1beta/tunedModels").status_code, credentials.token != old)
"""

SERVICE_ACCOUNT = """
import sys, json
from google.auth.transport.requests import AuthorizedSession, Request
from google.oauth2 import service_account

file, address, body = sys.argv[1:]
scopes = ["https://www.googleapis.com/auth/cloud-platform"]
credentials = service_account.Credentials.from_service_account_file(file, scopes=scopes)
session = AuthorizedSession(credentials)
operation = session.post(f"{address}/v1beta/tunedModels", json=json.loads(body)).json()
print(operation["metadata"]["tunedModel"])

signed_here = credentials.with_always_use_jwt_access(True)
signed_here._create_self_signed_jwt(None)
signed_here.refresh(Request())
session = AuthorizedSession(signed_here)
print(signed_here.token.count("."), session.get(f"{address}/v1beta/tunedModels").status_code)

other = "https://other.example"
identity = service_account.IDTokenCredentials.from_service_account_file(file, target_audience=other)
identity.refresh(Request())
print(identity.token)
"""


def run(site: Site, home: Path, program: str, *arguments: str, **variables: str) -> list[str]:
    """Run a program as somebody has it who trusts the site's authority; return the lines that it prints."""
    environment = site.environment(home, REQUESTS_CA_BUNDLE=str(site.ca), PYTHONWARNINGS="ignore", **variables)
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT,
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if not line.startswith("Please visit")]


@pytest.mark.parametrize("options", [(), ("--plain",)])
def test_an_installed_app(site: Site, tmp_path: Path, options: tuple[str, ...]) -> None:
    file = site.client_secret(*options)
    assert run(site, tmp_path, INSTALLED_APP, str(file), site.server.url) == ["200", "True 200"]


def test_application_default_credentials(site: Site, tmp_path: Path) -> None:
    """The file is the one that gcloud writes after the tutorial's line; its own tests are elsewhere."""
    installed = json.loads(site.client_secret().read_text())["installed"]
    program = Program(site.server, EMAIL, site.trust)
    given = program.signed_in()
    program.http.close()
    file = tmp_path / "credentials.json"
    file.write_text(
        json.dumps(
            {
                "type": "external_account_authorized_user",
                "client_id": program.id,
                "client_secret": program.secret,
                "refresh_token": given["refresh_token"],
                "token_url": installed["token_uri"],
                "token_info_url": installed["token_info_url"],
                "universe_domain": "googleapis.com",
            }
        )
    )
    variables = {"GOOGLE_APPLICATION_CREDENTIALS": str(file)}
    assert run(site, tmp_path, DEFAULT, site.server.url, **variables) == ["200", "200 True"]


def test_a_service_account(site: Site, tmp_path: Path) -> None:
    key = tmp_path / "key.json"
    site.server.run("service-account", "create", "Robot@example.com", "--url", site.server.url, "-o", str(key))
    assert key.stat().st_mode & 0o777 == 0o600
    printed = run(site, tmp_path, SERVICE_ACCOUNT, str(key), site.server.url, json.dumps(job(epochs=1)))
    assert printed[0].startswith("tunedModels/")
    assert printed[1] == "2 200"
    keys = httpx2.get(f"{site.server.url}/oauth2/v3/certs", verify=site.trust).json()
    claims = jwt.decode(printed[2], KeySet.import_key_set(keys), ["RS256"]).claims
    assert claims["email"] == claims["azp"] == "robot@example.com"
    assert (claims["iss"], claims["aud"]) == (site.server.url, "https://other.example")
    assert "robot@example.com" in site.server.run("service-account", "list")
