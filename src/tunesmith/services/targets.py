"""Which model a request asks, and how it is asked."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tunesmith import protos
from tunesmith.base_models.catalog import BaseModel, Catalog
from tunesmith.base_models.prompts import Turn
from tunesmith.caller import Caller
from tunesmith.engines.base import Sampling
from tunesmith.errors import InvalidArgument, NotFound
from tunesmith.services import access, lineage
from tunesmith.store.database import Database

MOST_STOP_SEQUENCES = 5
MOST_CANDIDATES = 8
LONGEST_INPUT = 40_000


@dataclass(frozen=True)
class Target:
    """The model that answers, and what it answers with when the request does not say."""

    base: BaseModel
    adapter: str | None
    temperature: float
    top_p: float
    top_k: int


class Targets:
    """Finds models by the names in requests."""

    def __init__(self, database: Database, catalog: Catalog) -> None:
        self._database, self._catalog = database, catalog

    def find(self, name: str, caller: Caller, method: str) -> Target:
        """Return the base model or the tuned model that a request names.

        Raises:
            NotFound: There is none; the message names the method.
            PermissionDenied: The caller may not ask it.
            FailedPrecondition: It has no weights, now or ever.
        """
        if not name.startswith("tunedModels/"):
            base = self.base(name, method)
            return Target(base, None, base.temperature, base.top_p, base.top_k)
        with self._database.read() as session:
            row = access.tuned_model(session, caller, name)
            adapter = lineage.adapter_of(session, row)
            message = protos.TunedModel.FromString(row.message)
            base = self._catalog.get(f"models/{row.base}")
            return Target(base, adapter, message.temperature, message.top_p, message.top_k)

    def base(self, name: str, method: str) -> BaseModel:
        """Return the base model that a request names.

        Raises:
            NotFound: There is none; the message names the method.
        """
        base = self._catalog.find(name)
        if base is None:
            raise NotFound(
                f"{name} is not found for API version v1beta, or is not supported for {method}. Call "
                "ListModels to see the list of available models and their supported methods."
            )
        return base


def conversation(
    contents: Sequence[protos.Content], path: str, system: protos.Content | None, system_path: str
) -> list[Turn]:
    """Return the turns of a request; contents of one role in a row are one turn, and the instruction is first.

    Raises:
        InvalidArgument: There are none, a role is unknown, the text is too long, or a part is no text.
    """
    if not contents:
        raise InvalidArgument.at([(path, "contents is not specified")])
    turns: list[Turn] = []
    for number, content in enumerate(contents):
        if content.role not in ("", "user", "model"):
            raise InvalidArgument.at(
                [(f"{path}[{number}].role", f"please use a valid role: user, model, not {content.role!r}")]
            )
        role: Literal["user", "model"] = "model" if content.role == "model" else "user"
        text = text_of(content, f"{path}[{number}]")
        if turns and turns[-1].role == role:
            turns[-1] = replace(turns[-1], text=f"{turns[-1].text}\n{text}")
        else:
            turns.append(Turn(role, text))
    if system is not None and (instruction := text_of(system, system_path)):
        turns.insert(0, Turn("system", instruction))
    length = sum(len(turn.text) for turn in turns)
    if length > LONGEST_INPUT:
        raise InvalidArgument.at([(path, f"must be at most {LONGEST_INPUT:,} characters long, not {length:,}")])
    return turns


def question(turns: Sequence[Turn], contents: Sequence[protos.Content], path: str) -> None:
    """Refuse a conversation that asks nothing.

    Raises:
        InvalidArgument: It does not end with a text of the user's.
    """
    if turns[-1].role != "user":
        raise InvalidArgument.at([(path, "the last content must be the user's")])
    if not turns[-1].text:
        raise InvalidArgument.at([(f"{path}[{len(contents) - 1}].parts", "the text is empty")])


def text_of(content: protos.Content, path: str) -> str:
    """Return the text of a content's parts.

    Raises:
        InvalidArgument: A part is no text.
    """
    for number, part in enumerate(content.parts):
        if (kind := part.WhichOneof("data")) not in (None, "text"):
            raise InvalidArgument.at([(f"{path}.parts[{number}].{kind}", "these models take text only")])
    return "".join(part.text for part in content.parts)


def sampling(config: protos.GenerationConfig | protos.GenerateTextRequest, target: Target, path: str) -> Sampling:
    """Return how tokens are chosen: what the request says, else what the model says.

    Raises:
        InvalidArgument: Names every value that is out of range.
    """
    limit = target.base.output_token_limit
    chosen = Sampling(
        temperature=config.temperature if config.HasField("temperature") else target.temperature,
        top_p=config.top_p if config.HasField("top_p") else target.top_p,
        top_k=config.top_k if config.HasField("top_k") else target.top_k,
        max_output_tokens=config.max_output_tokens if config.HasField("max_output_tokens") else limit,
        stop_sequences=tuple(config.stop_sequences),
        candidates=config.candidate_count if config.HasField("candidate_count") else 1,
    )
    bad = {
        "temperature": (0 <= chosen.temperature <= 2, f"must be between 0 and 2, not {chosen.temperature:g}"),
        "top_p": (0 <= chosen.top_p <= 1, f"must be between 0 and 1, not {chosen.top_p:g}"),
        "top_k": (chosen.top_k >= 0, f"must not be negative, not {chosen.top_k}"),
        "max_output_tokens": (
            1 <= chosen.max_output_tokens <= limit,
            f"must be between 1 and {limit}, not {chosen.max_output_tokens}",
        ),
        "stop_sequences": (
            len(chosen.stop_sequences) <= MOST_STOP_SEQUENCES and all(chosen.stop_sequences),
            f"must be at most {MOST_STOP_SEQUENCES} texts, none of them empty",
        ),
        "candidate_count": (
            1 <= chosen.candidates <= MOST_CANDIDATES,
            f"must be between 1 and {MOST_CANDIDATES}, not {chosen.candidates}",
        ),
    }
    if violations := [(f"{path}.{field}", reason) for field, (fine, reason) in bad.items() if not fine]:
        raise InvalidArgument.at(violations)
    return chosen
