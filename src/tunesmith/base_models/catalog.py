"""The base models on offer, read from catalog.toml and the operator's own file."""

import tomllib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Literal

from pydantic import BaseModel as Record
from pydantic import ConfigDict, Field, model_validator

from tunesmith import protos
from tunesmith.config import Settings
from tunesmith.errors import NotFound

METHODS = (
    "generateContent",
    "countTokens",
    "createTunedModel",
    "embedContent",
    "batchEmbedContents",
    "generateText",
    "countTextTokens",
)
PALM = "text-bison"
PALM_METHODS = ("createTunedTextModel",)
"""By which clients of PaLM's time look for a model that they can tune."""


class BaseModel(Record):
    """One model that can be tuned and served; a block of catalog.toml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    display_name: str
    version: str
    description: str = ""
    packages: tuple[str, ...] = ()
    sha256: str = ""
    download_megabytes: int = 0
    hub: str = ""
    revision: str = "main"
    path: Path | None = None
    published_as: str = ""
    """The Hugging Face repository of the same model, when its weights come from elsewhere."""
    licence: str
    prompt_format: Literal["labelled", "chatml"]
    """How tuned models are asked; prompts.py has the formats."""
    untuned_prompt_format: Literal["plain", "chatml"]
    """How the model itself is asked."""
    input_token_limit: int = Field(gt=0)
    output_token_limit: int = Field(gt=0)
    tuning_token_limit: int = Field(2048, gt=0)
    """Longest row that is trained on; the input's beginning is cut from longer ones."""
    # Greedy by default: a tuned model does one job, and the same question gets the same answer.
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(0.95, gt=0, le=1)
    top_k: int = Field(64, gt=0)

    @model_validator(mode="after")
    def _one_source(self) -> "BaseModel":
        if sum((bool(self.packages), bool(self.hub), self.path is not None)) != 1:
            raise ValueError(f"model {self.id}: give one of packages, hub or path")
        return self

    def to_message(self, name: str) -> protos.Model:
        """Return the official message, under the name that was asked for."""
        asked = name.removeprefix("models/")
        description = self.description
        if asked != self.id:
            description = f"Another name for models/{self.id}, whose weights answer. {description}"
        return protos.Model(
            name=name,
            base_model_id=asked,
            version=self.version,
            display_name=self.display_name,
            description=description,
            input_token_limit=self.input_token_limit,
            output_token_limit=self.output_token_limit,
            supported_generation_methods=METHODS + (PALM_METHODS if asked.startswith(PALM) else ()),
            temperature=self.temperature,
            max_temperature=2.0,
            top_p=self.top_p,
            top_k=self.top_k,
        )


class Catalog:
    """Base models by name, with aliases."""

    def __init__(self, models: Mapping[str, BaseModel], aliases: Mapping[str, str], default: str) -> None:
        for alias, target in [*aliases.items(), ("default", default)]:
            if target not in models:
                raise ValueError(f"{alias} names the base model {target!r}, which is not in the catalog")
        self.models = dict(models)
        self.aliases = {alias: target for alias, target in aliases.items() if alias not in models}
        self.default = self.models[default]

    @classmethod
    def load(cls, settings: Settings) -> "Catalog":
        """Read the catalog that ships with Tunesmith and, over it, the operator's."""
        texts = [files(__package__).joinpath("catalog.toml").read_text("utf-8")]
        if settings.catalog is not None:
            texts.append(settings.catalog.read_text("utf-8"))
        models: dict[str, BaseModel] = {}
        aliases: dict[str, str] = {}
        default = ""
        for text in texts:
            parsed = tomllib.loads(text)
            for model_id, block in parsed.get("models", {}).items():
                models[model_id] = BaseModel(id=model_id, **block)
            aliases |= parsed.get("aliases", {})
            default = parsed.get("default", default)
        return cls(models, aliases | settings.aliases, default)

    def names(self) -> list[str]:
        """Return all names, `models/{id}`: the models' own, then the aliases."""
        return [f"models/{model_id}" for model_id in (*self.models, *self.aliases)]

    def find(self, name: str) -> BaseModel | None:
        """Return the model that `models/{id}` stands for, or None."""
        prefix, _, model_id = name.partition("/")
        if prefix != "models":
            return None
        return self.models.get(self.aliases.get(model_id, model_id))

    def get(self, name: str) -> BaseModel:
        """Return the model that `models/{id}` stands for.

        Raises:
            NotFound: There is none.
        """
        model = self.find(name)
        if model is None:
            raise NotFound(f"{name} is not found. Call ListModels to see the list of available models.")
        return model
