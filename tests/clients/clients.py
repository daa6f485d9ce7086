"""The clients that are driven, each with the packages it is pinned to."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
PINS = HERE / "pins"
GRPC = "gRPC with TLS"


@dataclass(frozen=True)
class Client:
    """One client on one transport.

    Attributes:
        name: What the tables call it; the package's own name.
        pins: In `pins/`: a requirements file, or a folder with package.json and package-lock.json; "" when the
            client is a program of this machine.
        driver: The script in `drivers/` that makes its calls.
        transport: Named where a client has more than one.
    """

    name: str
    pins: str
    driver: str
    transport: str = ""

    @property
    def version(self) -> str:
        """The pinned version, or "" for a program of this machine."""
        if not self.pins:
            return ""
        path = PINS / self.pins
        if path.is_dir():
            return str(json.loads((path / "package.json").read_text("utf-8"))["dependencies"][self.name])
        pins = dict(line.strip().split("==") for line in path.read_text("utf-8").splitlines())
        return pins[self.name]

    @property
    def title(self) -> str:
        """Name, version and transport, as the tables head it."""
        return ", ".join(filter(None, [f"{self.name} {self.version}".strip(), self.transport]))

    @property
    def slug(self) -> str:
        """A name for its account and its models: at most 24 of a-z, 0-9 and -."""
        words = re.findall("[a-z0-9]+", f"{self.name} {self.transport.split()[:1]} {self.version}".lower())
        return "-".join(words).replace("google", "g")[:24].strip("-")


CLIENTS = (
    Client("google-generativeai", "google-generativeai.txt", "google_generativeai.py", "REST"),
    Client("google-generativeai", "google-generativeai.txt", "google_generativeai.py", GRPC),
    Client("google-genai", "google-genai-1.46.0.txt", "google_genai.py"),
    Client("google-genai", "google-genai-3.4.0.txt", "google_genai.py"),
    Client("@google/genai", "npm-google-genai-1.27.0", "google_genai.mjs"),
    Client("@google/genai", "npm-google-genai-3.1.0", "google_genai.mjs"),
    Client("@google/generative-ai", "npm-google-generative-ai-0.24.1", "google_generative_ai.mjs"),
    Client("google-api-python-client", "google-api-python-client.txt", "google_api_python_client.py"),
    Client("langchain-google-genai", "langchain-google-genai.txt", "langchain_chat.py"),
    Client("litellm", "litellm.txt", "litellm_completion.py"),
    Client("openai", "openai.txt", "openai_package.py"),
    Client("curl", "", "curl.py"),
)
