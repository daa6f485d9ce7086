"""Settings: one flat record; each field is an environment variable and a key of tunesmith.toml."""

import os
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)


def _xdg(variable: str, default: str) -> Path:
    return Path(os.environ.get(variable) or Path.home() / default) / "tunesmith"


class Settings(BaseSettings):
    """Everything that can be set.

    What a command line names wins over `TUNESMITH_<FIELD>`, which wins over `tunesmith.toml` (in the current
    directory, or the file that `TUNESMITH_CONFIG` names), which wins over the default.
    """

    model_config = SettingsConfigDict(env_prefix="TUNESMITH_", extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8080, ge=0, le=65535, description="REST port; 0 takes a free one.")
    grpc_port: int = Field(8081, ge=0, le=65535, description="gRPC port; 0 takes a free one.")
    ssl_certfile: Path | None = Field(
        None, description="Certificate chain in PEM: REST and gRPC are then served over TLS only."
    )
    ssl_keyfile: Path | None = Field(None, description="The certificate's private key in PEM.")
    cors_origins: str = Field(
        "*", description="Origins of web pages whose scripts may call, separated by commas; * for all."
    )
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
    max_batch: int = Field(16, gt=0, description="Sequences generated together.")
    loaded_adapters: int = Field(32, gt=0, description="Tuned models kept in memory.")
    log_level: str = Field("info", description="debug, info, warning or error.")

    @field_validator("data_dir", "cache_dir")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        return path.expanduser().absolute()

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
