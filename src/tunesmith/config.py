"""Settings: one flat record; each field is an environment variable and a key of tunesmith.toml."""

import os
import re
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)


def _xdg(variable: str, default: str) -> Path:
    return Path(os.environ.get(variable) or Path.home() / default) / "tunesmith"


NO_GRPC = -1
"""In place of a port: REST only."""

SigningAlgorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512"]
"""Of other people's tokens; none with a shared secret."""

BlockThreshold = Literal["BLOCK_LOW_AND_ABOVE", "BLOCK_MEDIUM_AND_ABOVE", "BLOCK_ONLY_HIGH", "BLOCK_NONE"]


class Issuer(BaseModel):
    """An OpenID Connect issuer, somebody else's sign-in whose tokens are taken: `[[issuers]]` in the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(description="Its address, to the letter as its tokens have it in `iss`.")
    audiences: list[str] = Field(
        min_length=1, description="For whom tokens are made: one of these must be in `aud`."
    )
    authorized_parties: list[str] = Field(
        default_factory=list,
        description="Programs that may have asked for the token, in `azp` or `client_id`; empty for all.",
    )
    algorithms: list[SigningAlgorithm] = Field(
        default=["RS256", "ES256"], min_length=1, description="How its tokens may be signed."
    )
    account_claim: str = Field("email", min_length=1, description="The claim with the account's e-mail address.")
    verified_claim: str = Field(
        "email_verified", description="A claim that must be true; empty when the issuer has none."
    )
    domains: list[str] = Field(
        min_length=1,
        description="For which e-mail addresses it may speak: what comes after the @; * for all.",
    )
    create_accounts: bool = Field(True, description="Whether who comes for the first time gets an account.")
    groups_claim: str = Field("", description="The claim with the groups that somebody is in; empty for none.")
    groups: dict[str, str] = Field(
        default_factory=dict,
        description="What the issuer calls a group, to its address here; addresses in `domains` need no line.",
    )
    scopes: list[str] = Field(
        default=["generative-language", "generative-language.tuning"],
        min_length=1,
        description="What its tokens may do here: scopes of Google's.",
    )

    @field_validator("url")
    @classmethod
    def _address(cls, url: str) -> str:
        if not fetchable(url) or "?" in url or "#" in url:
            raise ValueError("must be https://HOST or https://HOST/PATH; http only for an issuer on this machine")
        return url

    @field_validator("domains")
    @classmethod
    def _lower(cls, domains: list[str]) -> list[str]:
        return [domain.strip().removeprefix("@").lower() for domain in domains]

    @model_validator(mode="after")
    def _not_everybody(self) -> Self:
        if self.create_accounts and "*" in self.domains:
            raise ValueError(
                "domains: with * everybody whom the issuer knows would get an account; name the domains, or set "
                "create_accounts = false"
            )
        return self


def fetchable(url: str) -> bool:
    """Whether what an address holds can be trusted: it is https, or on this machine."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        return False
    if not host or parts.username is not None:
        return False
    return parts.scheme == "https" or (parts.scheme == "http" and _is_here(host))


def _is_here(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


class Settings(BaseSettings):
    """Everything that can be set.

    What a command line names wins over `TUNESMITH_<FIELD>`, which wins over `tunesmith.toml` (in the current
    directory, or the file that `TUNESMITH_CONFIG` names), which wins over the default.
    """

    model_config = SettingsConfigDict(env_prefix="TUNESMITH_", extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8080, ge=0, le=65535, description="REST port; 0 takes a free one.")
    grpc_port: int = Field(
        8081, ge=NO_GRPC, le=65535, description="gRPC port; 0 takes a free one, -1 serves REST only."
    )
    ssl_certfile: Path | None = Field(
        None, description="Certificate chain in PEM: REST and gRPC are then served over TLS only."
    )
    ssl_keyfile: Path | None = Field(None, description="The certificate's private key in PEM.")
    insecure: bool = Field(
        False,
        description="Listen without TLS where other machines can reach it, because something in front does TLS.",
    )
    cors_origins: str = Field(
        "*", description="Origins of web pages whose scripts may call, separated by commas; * for all."
    )
    public_url: str = Field(
        "",
        description="Address at which clients reach the server, such as https://tunesmith.example.com; empty for "
        "the one that each request names. Behind a proxy that changes the Host header it must be set.",
    )
    access_token_seconds: int = Field(3600, gt=0, description="How long access tokens of sign-ins are good.")
    data_dir: Path = Field(
        default_factory=lambda: _xdg("XDG_DATA_HOME", ".local/share"),
        description="Where accounts, models, jobs and adapters live.",
    )
    cache_dir: Path = Field(
        default_factory=lambda: _xdg("XDG_CACHE_HOME", ".cache"),
        description="Where converted base model weights live.",
    )
    workers: int = Field(1, ge=0, description="Training processes that `serve` starts; 0 for none.")
    database_url: str = Field("", description="SQLAlchemy URL; empty for SQLite in the data dir.")
    database_wait_seconds: float = Field(
        10.0,
        gt=0,
        description="How long a request waits for a SQLite database that another process has locked, before 503.",
    )
    artifacts_url: str = Field("", description="fsspec URL for adapters; empty for the data dir.")
    catalog: Path | None = Field(None, description="A TOML file with more base models, as catalog.toml.")
    aliases: dict[str, str] = Field(
        default_factory=dict, description="More names for base models: asked-for name to catalog name."
    )
    device: str = Field("auto", description="torch device: auto, cpu, cuda, mps.")
    threads: int = Field(0, ge=0, description="CPU threads of a training process; 0 for all cores.")
    seed: int = Field(0, ge=0, description="Seed of every tuning job: same data, same model.")
    lease_seconds: float = Field(15.0, gt=0, description="How long a silent worker keeps its job.")
    checkpoint_seconds: float = Field(
        10.0, ge=0, description="Training time between two checkpoints of a job; 0 for one each step."
    )
    max_body_bytes: int = Field(8 << 20, gt=0, description="Largest request body.")
    receive_seconds: float = Field(
        60.0, gt=0, description="How long a client may take to send a request's head, and then its body."
    )
    requests_per_minute: int = Field(
        60_000,
        ge=0,
        description="API requests of an account in a minute, at each server process; so many at once if none "
        "came before. 0 for no limit.",
    )
    generations_per_account: int = Field(
        32,
        ge=0,
        description="Answers and embeddings that an account may have under way at a time, at each server process; "
        "a stream counts until it ends. 0 for no limit.",
    )
    queued_jobs_per_account: int = Field(
        100, ge=0, description="Tuning jobs of an account that may wait for a worker; 0 for no limit."
    )
    watches_per_account: int = Field(
        32,
        ge=0,
        description="Jobs that an account may watch at a time, at each server process, which holds 240 watches; 0 "
        "for no limit.",
    )
    exports_per_account: int = Field(
        2,
        ge=0,
        description="Exports that an account may have under way at a time, at each server process; 0: no limit.",
    )
    engine: Literal["torch", "vllm"] = Field(
        "torch",
        description="What answers: torch (this process, on the device) or vllm (a vLLM server: docs/vllm.md).",
    )
    vllm_url: str = Field(
        "", description="Address of the vLLM server, such as http://127.0.0.1:8000; prompts and answers go there."
    )
    vllm_api_key: SecretStr = Field(
        SecretStr(""), description="What the vLLM server was started with as --api-key; empty when with none."
    )
    vllm_base_model: str = Field(
        "", description="The base model, as the catalog names it, that the vLLM server has; empty for the default."
    )
    vllm_model: str = Field(
        "", description="What the vLLM server calls the base model; empty for the only one that it has."
    )
    vllm_adapters_dir: Path | None = Field(
        None, description="Where adapters are written for the vLLM server; left out, in the data dir."
    )
    vllm_adapters_path: str = Field(
        "", description="The same folder as the vLLM server sees it, when that is not under the same path."
    )
    vllm_silence_seconds: float = Field(
        120.0, gt=0, description="How long the vLLM server may say nothing to a request before that ends with 503."
    )
    vllm_max_seqs: int = Field(
        256,
        gt=0,
        description="Requests that the vLLM server is given at a time, its --max-num-seqs; more wait here, where "
        "accounts take turns.",
    )
    max_batch: int = Field(16, gt=0, description="Sequences generated together.")
    loaded_adapters: int = Field(
        32, gt=0, description="Tuned models kept in memory: at rank 16 about 15 MB each with Gemma 3 270M."
    )
    kv_cache_mb: int = Field(
        1024,
        gt=0,
        description="Memory in MB for what answers of a base model keep of their tokens (18 KB each with Gemma 3 "
        "270M), on CPUs with a matrix unit; who does not fit waits.",
    )
    waiting_answers: int = Field(
        64,
        ge=0,
        description="Answers and embeddings of a base model that may wait for their turn; who comes then is told "
        "when to try again (429), or takes the place of somebody who has more waiting.",
    )
    waiting_seconds: float = Field(
        60.0,
        gt=0,
        description="How long an answer may wait for its turn: what is likely to wait longer is refused (429), "
        "and what does is given up (503).",
    )
    worker_nice: int = Field(
        10,
        ge=0,
        le=19,
        description="How far training gives way to the rest of the machine, answers above all; 0 not at all.",
    )
    safety_rater: str = Field(
        "lexicon",
        pattern=r"^(lexicon|off|models/[a-zA-Z0-9._-]+)$",
        description="What rates prompts and answers: lexicon (English words and phrases, see docs/safety.md), "
        "models/NAME (a model of the catalog is asked, four times a rating), or off (no ratings, none blocked).",
    )
    safety_threshold: BlockThreshold = Field(
        "BLOCK_NONE",
        description="From which rating on prompts and answers are blocked when a request's safetySettings do not "
        "say.",
    )
    safety_cuts: tuple[float, float, float] = Field(
        (0.25, 0.5, 0.8),
        description="With a model as rater: from which probability of a violation on a rating is LOW, MEDIUM and "
        "HIGH.",
    )
    issuers: list[Issuer] = Field(
        default_factory=list, description="OpenID Connect issuers whose tokens are taken, beside our own."
    )
    log_level: str = Field("info", description="debug, info, warning or error.")

    @field_validator("data_dir", "cache_dir")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        return path.expanduser().absolute()

    @field_validator("public_url")
    @classmethod
    def _address(cls, url: str) -> str:
        if url and not re.fullmatch(r"https?://[A-Za-z0-9.\[\]:_-]+/?", url):
            raise ValueError("must be https://HOST or https://HOST:PORT, without a path")
        return url.rstrip("/")

    @field_validator("issuers")
    @classmethod
    def _told_apart(cls, issuers: list[Issuer]) -> list[Issuer]:
        if len({issuer.url for issuer in issuers}) < len(issuers):
            raise ValueError("two have the same url; put what both say into one")
        return issuers

    @model_validator(mode="after")
    def _vllm_with_address(self) -> Self:
        if self.engine == "vllm" and not re.fullmatch(r"https?://[^/?#]+(/[^?#]*)?", self.vllm_url):
            raise ValueError("vllm_url: set it to the server's address, such as http://127.0.0.1:8000")
        return self

    @model_validator(mode="after")
    def _key_with_certificate(self) -> Self:
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("ssl_certfile and ssl_keyfile go together: set both, or neither")
        return self

    @property
    def database(self) -> str:
        """The SQLAlchemy URL of the database."""
        return self.database_url or f"sqlite:///{self.data_dir / 'tunesmith.db'}"

    @property
    def vllm_adapters(self) -> Path:
        """The folder for the vLLM server's adapters."""
        return (self.vllm_adapters_dir or self.data_dir / "vllm-adapters").expanduser().absolute()

    @property
    def artifacts(self) -> str:
        """The fsspec URL of the artifact store."""
        return self.artifacts_url or f"file://{self.data_dir / 'artifacts'}"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 — pydantic-settings names it
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources; see the class."""
        file = os.environ.get("TUNESMITH_CONFIG", "tunesmith.toml")
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, file)

    @classmethod
    def load(cls, **given: Any) -> "Settings":
        """Return the settings; a None in `given` means not given.

        Raises:
            ValueError: Names every setting that is wrong.
        """
        try:
            return cls(**{name: value for name, value in given.items() if value is not None})
        except ValidationError as error:
            wrong = [(".".join(map(str, one["loc"])), one["msg"]) for one in error.errors()]
            told = [f"{name}: {why}" if name else why.removeprefix("Value error, ") for name, why in wrong]
            raise ValueError("; ".join(told)) from error
