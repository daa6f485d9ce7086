"""GenerativeService: answers from base models and tuned models."""

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sqlalchemy import select

from tunesmith import protos
from tunesmith.base_models import weights
from tunesmith.base_models.catalog import BaseModel, Catalog
from tunesmith.base_models.prompts import Turn
from tunesmith.caller import Caller
from tunesmith.engines.base import Chunk, Engine, Sampling
from tunesmith.errors import FailedPrecondition, InvalidArgument, NotFound, Unimplemented
from tunesmith.services import access
from tunesmith.store.database import Database
from tunesmith.store.tables import Job

MOST_STOP_SEQUENCES = 5
LONGEST_INPUT = 40_000
_CONFIG = "GenerateContentRequest.generation_config"


@dataclass(frozen=True)
class Target:
    """The model that answers, and what it answers with when the request does not say."""

    name: str
    base: BaseModel
    adapter: str | None
    temperature: float
    top_p: float
    top_k: int


class GenerativeService:
    """The inference half of google.ai.generativelanguage.v1beta.GenerativeService."""

    def __init__(self, database: Database, engine: Engine, catalog: Catalog, cache_dir: Path) -> None:
        self._database, self._engine, self._catalog = database, engine, catalog
        self._cache_dir = cache_dir

    def generate_content(
        self, request: protos.GenerateContentRequest, caller: Caller
    ) -> protos.GenerateContentResponse:
        """Return a whole answer."""
        chunks = list(self.stream_generate_content(request, caller))
        response = chunks[-1]
        text = "".join(part.text for chunk in chunks for part in chunk.candidates[0].content.parts)
        del response.candidates[0].content.parts[:]
        response.candidates[0].content.parts.add(text=text)
        return response

    def stream_generate_content(
        self, request: protos.GenerateContentRequest, caller: Caller
    ) -> Iterator[protos.GenerateContentResponse]:
        """Yield an answer piece by piece; the last piece has the finish reason."""
        _refuse_unimplemented(request)
        target = self._target(request.model, caller, "generateContent")
        turns = _turns(request.contents, "GenerateContentRequest.contents")
        sampling = _sampling(request.generation_config, target)
        version = weights.get(target.base, self._cache_dir).version
        response_id = secrets.token_urlsafe(12)
        for chunk in self._engine.generate(target.base, target.adapter, turns, sampling, caller.gone):
            yield _response(chunk, version, response_id)

    def count_tokens(self, request: protos.CountTokensRequest, caller: Caller) -> protos.CountTokensResponse:
        """Return how many tokens a prompt is, as the model sees it."""
        contents = request.contents or request.generate_content_request.contents
        target = self._target(request.model, caller, "countTokens")
        turns = _turns(contents, "CountTokensRequest.contents")
        return protos.CountTokensResponse(
            total_tokens=self._engine.count_tokens(target.base, target.adapter, turns)
        )

    def _target(self, name: str, caller: Caller, method: str) -> Target:
        if not name.startswith("tunedModels/"):
            base = self._catalog.find(name)
            if base is None:
                raise NotFound(
                    f"{name} is not found for API version v1beta, or is not supported for {method}. Call "
                    "ListModels to see the list of available models and their supported methods."
                )
            return Target(name, base, None, base.temperature, base.top_p, base.top_k)
        with self._database.read() as session:
            row = access.tuned_model(session, caller, name)
            if row.adapter is None:
                job = session.scalars(select(Job).where(Job.tuned_model == row.id)).one()
                raise _not_active(name, row.state, job)
            message = protos.TunedModel.FromString(row.message)
            return Target(
                name,
                self._catalog.get(f"models/{row.base}"),
                row.adapter,
                message.temperature,
                message.top_p,
                message.top_k,
            )


def _not_active(name: str, state: int, job: Job) -> FailedPrecondition:
    if state == protos.TunedModel.CREATING:
        operation = f"{name}/operations/{job.id}"
        return FailedPrecondition(
            f"Tuned model {name} is in state CREATING: wait until its operation {operation} is done."
        )
    reason = protos.Status.FromString(job.error or b"").message
    return FailedPrecondition(f"Tuned model {name} is in state FAILED: {reason}")


def _refuse_unimplemented(request: protos.GenerateContentRequest) -> None:
    """Name what the request asks for and this server does not do, instead of doing without it."""
    config = request.generation_config
    asked = {
        "tools": bool(request.tools),
        "system_instruction": bool(request.system_instruction.parts),
        "cached_content": bool(request.cached_content),
        "generation_config.candidate_count above 1": config.candidate_count > 1,
        "generation_config.response_mime_type": config.response_mime_type not in ("", "text/plain"),
        "generation_config.response_schema": config.HasField("response_schema"),
        "generation_config.response_json_schema": (
            config.HasField("response_json_schema") or config.HasField("response_json_schema_ordered")
        ),
        "generation_config.presence_penalty": config.presence_penalty != 0,
        "generation_config.frequency_penalty": config.frequency_penalty != 0,
        "generation_config.response_logprobs": config.response_logprobs,
        "generation_config.response_modalities other than TEXT": any(
            modality != protos.GenerationConfig.TEXT for modality in config.response_modalities
        ),
    }
    if wanted := [field for field, is_asked in asked.items() if is_asked]:
        raise Unimplemented(
            "; ".join(f"GenerateContentRequest.{field} is not implemented by this server" for field in wanted)
            + "."
        )


def _turns(contents: Sequence[protos.Content], path: str) -> list[Turn]:
    """Return the conversation; contents of one role in a row are one turn."""
    if not contents:
        raise InvalidArgument.at([(path, "contents is not specified")])
    turns: list[Turn] = []
    for number, content in enumerate(contents):
        if content.role not in ("", "user", "model"):
            raise InvalidArgument.at(
                [(f"{path}[{number}].role", f"please use a valid role: user, model, not {content.role!r}")]
            )
        role: Literal["user", "model"] = "model" if content.role == "model" else "user"
        text = "".join(_text(part, f"{path}[{number}].parts[{i}]") for i, part in enumerate(content.parts))
        if turns and turns[-1].role == role:
            turns[-1] = Turn(role, f"{turns[-1].text}\n{text}")
        else:
            turns.append(Turn(role, text))
    if turns[-1].role != "user":
        raise InvalidArgument.at([(path, "the last content must be the user's")])
    if not turns[-1].text:
        raise InvalidArgument.at([(f"{path}[{len(contents) - 1}].parts", "the text is empty")])
    length = sum(len(turn.text) for turn in turns)
    if length > LONGEST_INPUT:
        raise InvalidArgument.at([(path, f"must be at most {LONGEST_INPUT:,} characters long, not {length:,}")])
    return turns


def _text(part: protos.Part, path: str) -> str:
    kind = part.WhichOneof("data")
    if kind not in (None, "text"):
        raise Unimplemented(f"{path}: {kind} is not implemented by this server; text is.")
    return part.text


def _sampling(config: protos.GenerationConfig, target: Target) -> Sampling:
    """Return how tokens are chosen: what the request says, else what the model says."""
    limit = target.base.output_token_limit
    sampling = Sampling(
        temperature=config.temperature if config.HasField("temperature") else target.temperature,
        top_p=config.top_p if config.HasField("top_p") else target.top_p,
        top_k=config.top_k if config.HasField("top_k") else target.top_k,
        max_output_tokens=config.max_output_tokens if config.HasField("max_output_tokens") else limit,
        seed=config.seed if config.HasField("seed") else None,
        stop_sequences=tuple(config.stop_sequences),
    )
    bad = {
        "temperature": (
            0 <= sampling.temperature <= 2,
            f"must be between 0 and 2, not {sampling.temperature:g}",
        ),
        "top_p": (0 <= sampling.top_p <= 1, f"must be between 0 and 1, not {sampling.top_p:g}"),
        "top_k": (sampling.top_k >= 0, f"must not be negative, not {sampling.top_k}"),
        "max_output_tokens": (
            1 <= sampling.max_output_tokens <= limit,
            f"must be between 1 and {limit}, not {sampling.max_output_tokens}",
        ),
        "stop_sequences": (
            len(sampling.stop_sequences) <= MOST_STOP_SEQUENCES and all(sampling.stop_sequences),
            f"must be at most {MOST_STOP_SEQUENCES} texts, none of them empty",
        ),
    }
    if violations := [(f"{_CONFIG}.{field}", reason) for field, (fine, reason) in bad.items() if not fine]:
        raise InvalidArgument.at(violations)
    return sampling


def _response(chunk: Chunk, version: str, response_id: str) -> protos.GenerateContentResponse:
    response = protos.GenerateContentResponse(
        model_version=version,
        response_id=response_id,
        usage_metadata=protos.GenerateContentResponse.UsageMetadata(
            prompt_token_count=chunk.prompt_tokens,
            candidates_token_count=chunk.output_tokens,
            total_token_count=chunk.prompt_tokens + chunk.output_tokens,
        ),
    )
    candidate = response.candidates.add(index=0, finish_reason=chunk.finish_reason)
    candidate.content.role = "model"
    candidate.content.parts.add(text=chunk.text)
    return response
