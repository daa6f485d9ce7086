"""What CreateTunedModel and TuneModel do: a new tuned model and its job, in one transaction."""

import re
import secrets
import string
from collections.abc import Iterator

from sqlalchemy.exc import IntegrityError

from tunesmith import protos
from tunesmith.base_models.catalog import Catalog
from tunesmith.caller import Caller
from tunesmith.errors import AlreadyExists, InvalidArgument
from tunesmith.jobs import queue
from tunesmith.services import datasets, lineage
from tunesmith.services.operations import operation_message
from tunesmith.store import audit
from tunesmith.store.database import Database
from tunesmith.store.tables import Job, TunedModel
from tunesmith.store.times import now_in_microseconds
from tunesmith.training import checks, hyperparameters, split

LONGEST_DISPLAY_NAME = 40
MOST_VIOLATIONS = 50

Request = protos.CreateTunedModelRequest | protos.TuneModelRequest

_ALPHABET = string.ascii_lowercase + string.digits


class Creation:
    """Accepts tuning jobs.

    Args:
        database: Where they go.
        catalog: The base models.
        seed: Of jobs that ask for none.
        queued_jobs: How many jobs of an account may wait; 0 for any number.
    """

    def __init__(self, database: Database, catalog: Catalog, seed: int, queued_jobs: int = 0) -> None:
        self._database, self._catalog = database, catalog
        self._seed, self._queued_jobs = seed, queued_jobs

    def create(
        self, request: Request, caller: Caller, options: protos.TuningOptions | None = None
    ) -> protos.Operation:
        """Write a model, CREATING, and its job; return the job's operation.

        Raises:
            InvalidArgument: Names every field and row that is wrong.
            AlreadyExists: The id is taken.
            ResourceExhausted: The account has as many jobs waiting as it may.
        """
        given, options = request.tuned_model, options or protos.TuningOptions()
        path = f"{request.DESCRIPTOR.name}.tuned_model"
        refuse([*lineage.violations(self._catalog, given, path), *_violations(request, options)])
        examples = given.tuning_task.training_data.examples
        rows = datasets.count(given.tuning_task.training_data)
        resolved = hyperparameters.resolve(given.tuning_task.hyperparameters, rows)
        seed = options.seed if options.HasField("seed") else self._seed
        asked = queue.training_options(options)
        held_out = split.held_out(examples, asked, seed)
        warnings = checks.of_examples(examples, held_out, asked)
        model_id = request.tuned_model_id or generate_id(given.display_name)
        audit.note(f"tunedModels/{model_id}", f"from {lineage.asked_parent(given) or given.base_model}")
        try:
            with self._database.write() as session:
                queue.check_room(session, caller.account, self._queued_jobs)
                source = lineage.source(session, self._catalog, caller, given)
                model = _message(given, f"tunedModels/{model_id}", source, resolved)
                row = TunedModel(
                    id=model_id,
                    owner=caller.account,
                    base=source.base.id,
                    message=model.SerializeToString(),
                    state=model.state,
                    create_time=model.create_time.ToMicroseconds() / 1e6,
                )
                job = Job(
                    id=_random(12),
                    tuned_model=model_id,
                    state="queued",
                    training_data=given.tuning_task.training_data.SerializeToString(),
                    seed=seed,
                    total_steps=hyperparameters.total_steps(rows - len(held_out), resolved),
                    create_time=row.create_time,
                    start=source.adapter,
                    account=caller.account,
                    options=options.SerializeToString(),
                )
                session.add(row)
                session.flush()
                queue.enqueue(session, job, _messages(warnings))
                return operation_message(session, job, row)
        except IntegrityError:
            raise AlreadyExists(f"Tuned model tunedModels/{model_id} already exists.") from None


def _message(
    given: protos.TunedModel, name: str, source: lineage.Source, resolved: protos.Hyperparameters
) -> protos.TunedModel:
    """Return the message of a model that is to be tuned."""
    model = protos.TunedModel()
    model.CopyFrom(given)
    # Without the training data, which is input only: it is kept with the job.
    model.tuning_task.CopyFrom(protos.TuningTask(hyperparameters=resolved))
    source.write(model)
    model.name = name
    model.state = protos.TunedModel.CREATING
    model.create_time.CopyFrom(now_in_microseconds())
    model.update_time.CopyFrom(model.create_time)
    for field in ("temperature", "top_p", "top_k"):
        if not model.HasField(field):
            setattr(model, field, getattr(source.base, field))
    return model


def generate_id(display_name: str) -> str:
    """Return a model id as Google makes them: the display name's words, then a random part."""
    words = ("".join(re.findall("[a-z0-9]", word)) for word in display_name.lower().split())
    slug = "-".join(word for word in words if word)
    return f"{slug}-{_random(12)}" if slug else secrets.choice(string.ascii_lowercase) + _random(11)


def _random(length: int) -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))


def refuse(violations: list[tuple[str, str]]) -> None:
    """Raise InvalidArgument when there are violations, the first 50 of them by name."""
    if len(violations) > MOST_VIOLATIONS:
        more = len(violations) - MOST_VIOLATIONS
        path = violations[-1][0].partition("[")[0]
        violations = [*violations[:MOST_VIOLATIONS], (path, f"… and {more} more of them")]
    if violations:
        raise InvalidArgument.at(violations)


def _violations(request: Request, options: protos.TuningOptions) -> Iterator[tuple[str, str]]:
    """Yield all that is wrong with a create, each with the path of its field."""
    name = request.DESCRIPTOR.name
    model, path = request.tuned_model, f"{name}.tuned_model"
    model_id = request.tuned_model_id
    if model_id and not re.fullmatch("[a-z]([a-z0-9-]{0,38}[a-z0-9])?", model_id):
        yield (
            f"{name}.tuned_model_id",
            f"must be at most 40 of a-z, 0-9 and -, begin with a letter and not end with -, not {model_id!r}",
        )
    yield from field_violations(model, path)
    for field, reason in hyperparameters.violations(model.tuning_task.hyperparameters):
        yield f"{path}.tuning_task.hyperparameters.{field}", reason
    yield from _option_violations(options, datasets.count(model.tuning_task.training_data), f"{name}.options")
    yield from datasets.violations(model.tuning_task.training_data, f"{path}.tuning_task.training_data")


def _option_violations(given: protos.TuningOptions, rows: int, path: str) -> Iterator[tuple[str, str]]:
    if given.keep not in (
        protos.TuningOptions.KEEP_UNSPECIFIED,
        protos.TuningOptions.BEST,
        protos.TuningOptions.LAST,
    ):
        yield f"{path}.keep", f"must be BEST or LAST, not {given.keep}"
    for field, reason in split.violations(queue.training_options(given), rows):
        yield f"{path}.{field}", reason


def field_violations(model: protos.TunedModel, path: str) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with the fields that can also be changed later."""
    if len(model.display_name) > LONGEST_DISPLAY_NAME:
        yield f"{path}.display_name", _too_long(model.display_name, LONGEST_DISPLAY_NAME)
    if model.HasField("temperature") and not 0 <= model.temperature <= 2:
        yield f"{path}.temperature", f"must be between 0 and 2, not {model.temperature:g}"
    if model.HasField("top_p") and not 0 < model.top_p <= 1:
        yield f"{path}.top_p", f"must be above 0 and at most 1, not {model.top_p:g}"
    if model.HasField("top_k") and model.top_k < 1:
        yield f"{path}.top_k", f"must be at least 1, not {model.top_k}"
    for index, number in enumerate(model.reader_project_numbers):
        if number < 1:
            yield f"{path}.reader_project_numbers[{index}]", f"must be a project's number, not {number}"


def _too_long(text: str, most: int) -> str:
    return f"must be at most {most:,} characters long, not {len(text):,}"


def _messages(warnings: list[checks.DataWarning]) -> Iterator[protos.DataWarning]:
    for warning in warnings:
        yield protos.DataWarning(kind=warning.kind, rows=warning.rows, message=warning.message)
