"""The worker process: claim a job, train, store its snapshots, publish the adapter, finish."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any, Self

import torch

from tunesmith import protos
from tunesmith.base_models import weights
from tunesmith.base_models.catalog import BaseModel, Catalog
from tunesmith.base_models.device import pick_device
from tunesmith.base_models.prompts import FORMATS
from tunesmith.config import Settings
from tunesmith.errors import ApiError, Cancelled, FailedPrecondition, NotFound
from tunesmith.jobs import queue
from tunesmith.jobs.queue import RENEWALS, Claim, GivenUp, JobQueue, LeaseLost, Wishes
from tunesmith.store.artifacts import ArtifactStore, NotStored
from tunesmith.store.database import DatabaseUnavailable
from tunesmith.store.sweep import sweep_model
from tunesmith.training import checks, examples, split
from tunesmith.training.examples import Row
from tunesmith.training.loop import Base, Step, TuningRun, Validation

POLL_SECONDS = 0.2
PACE_STEPS = 20  # of which the mean says how long the rest will take
CHECKPOINT_SHARE = 20  # checkpoints take at most one part in so many of the training time
REPEATED_SHARE = 4  # and while steps are repeated, one part in so many
LONGEST_PAUSE = 60.0  # seconds between two tries to store an adapter

logger = logging.getLogger(__name__)


class Lease:
    """Renews a claim from a thread of its own, so that a slow step does not lose it.

    Attributes:
        lost: Set when the job belongs to somebody else: stop at once.
        cancelled: Set when the caller asked for the job's end.
        paused: Set while the caller wants the job to rest.
    """

    def __init__(self, queue: JobQueue, claim: Claim) -> None:
        self._queue, self._claim = queue, claim
        self.lost, self.cancelled, self._done = threading.Event(), threading.Event(), threading.Event()
        self.paused = threading.Event()
        if claim.cancelled:
            self.cancelled.set()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def heed(self, wishes: Wishes) -> None:
        """Take note of what was asked."""
        if wishes.cancelled:
            self.cancelled.set()
        if wishes.paused:
            self.paused.set()
        else:
            self.paused.clear()

    def _renew(self) -> None:
        try:
            while not self._done.wait(self._queue.lease_seconds / RENEWALS):
                self.heed(self._queue.renew(self._claim))
        except (LeaseLost, DatabaseUnavailable):
            pass  # the trainer sees it below
        finally:
            if not self._done.is_set():
                self.lost.set()


class Pace:
    """How fast the last steps went.

    Args:
        total_steps: Steps in all.
    """

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._seconds = deque[float](maxlen=PACE_STEPS)

    def message(self, step: Step) -> protos.TuningStep:
        """Return a step as it is told."""
        self._seconds.append(step.seconds)
        left = max(0, self._total_steps - step.step)
        return protos.TuningStep(
            step=step.step,
            epoch=step.epoch,
            mean_loss=step.mean_loss,
            learning_rate=step.learning_rate,
            gradient_norm=step.gradient_norm,
            tokens=step.tokens,
            seconds=step.seconds,
            tokens_per_second=step.tokens / step.seconds,
            eta_seconds=left * sum(self._seconds) / len(self._seconds),
        )


class Checkpoints:
    """When to make the next one: after so many seconds, and seldom enough to cost little.

    Args:
        seconds: Training time between two; 0 for one each step.
        repeated: Up to which step others have come before: steps until then are stored soon, or a job that is
            often interrupted would get no further.

    Attributes:
        failing: Whether the last one could not be stored.
    """

    def __init__(self, seconds: float, repeated: int) -> None:
        self._seconds, self._repeated = seconds, repeated
        self._last, self._cost = time.monotonic(), 0.0
        self.failing = False

    def due(self, step: int) -> bool:
        """Return whether one is to be made after a step."""
        since = time.monotonic() - self._last
        if step <= self._repeated or not self._seconds:
            return since >= self._seconds or since >= REPEATED_SHARE * self._cost
        return since >= max(self._seconds, CHECKPOINT_SHARE * self._cost)

    def made(self, seconds: float) -> None:
        """Note that one was made, or failed, and how long it took."""
        self._last, self._cost = time.monotonic(), seconds


class Worker:
    """Does jobs one after another; the base model stays in memory between them."""

    def __init__(
        self, name: str, settings: Settings, queue: JobQueue, artifacts: ArtifactStore, catalog: Catalog
    ) -> None:
        self._name, self._settings = name, settings
        self._queue, self._artifacts, self._catalog = queue, artifacts, catalog
        self._device = pick_device(settings.device)
        self._base: Base | None = None
        self._claim: Claim | None = None
        self._training = threading.Event()
        if settings.threads:
            torch.set_num_threads(settings.threads)

    def prepare(self) -> None:
        """Load the default base model and warm it up, unless its weights are yet to be fetched."""
        if weights.find(self._catalog.default, self._settings.cache_dir):
            self.warm_up(self._catalog.default)

    def leaves(self) -> bool:
        """Return whether the process may end at once: no step is under way, and the job, if any, is put back."""
        if self._training.is_set():
            return False
        if claim := self._claim:
            with suppress(LeaseLost, DatabaseUnavailable):  # else its lease runs out
                self._queue.put_back(claim)
        return True

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set; a job that is under way then is checkpointed and put back.

        An error that is not the job's own ends the process: the job's lease runs out, whoever started the
        worker starts another, and a job that never gets through a step is given up by the queue.
        """
        self._queue.stopping = stop
        logger.info("worker %s is ready", self._name)
        while not stop.is_set():
            try:
                claim = self._queue.claim(self._name)
                if isinstance(claim, Claim):
                    self._claim = claim
                    self._work(claim, stop)
                elif claim:
                    logger.warning("job %s of tunedModels/%s is given up", claim.job, claim.tuned_model)
                    self._clean_up(claim)
                else:
                    stop.wait(POLL_SECONDS)
            except LeaseLost as lost:
                logger.warning("%s; leaving it", lost)
            except DatabaseUnavailable as error:  # only once it is to stop
                logger.warning("%s The job's lease runs out.", error.message)
            finally:
                self._claim = None
                self._training.clear()

    def warm_up(self, model: BaseModel) -> None:
        """Load a base model and take one step with it: the first one is slower than the others."""
        base = self._load(model)
        rows = [Row([1, 2, 3, 4], [5, 6])] * 4
        hyperparameters = protos.Hyperparameters(epoch_count=1, batch_size=4, learning_rate=0.001)
        with TuningRun(base, rows, hyperparameters, seed=0) as run:
            next(iter(run))

    def _load(self, model: BaseModel) -> Base:
        if self._base is None or self._base.weights.model != model:
            self._base = None  # free the memory before the next one takes it
            found = weights.ensure(model, self._settings.cache_dir)
            self._base = Base.load(found, self._device)
        return self._base

    def _work(self, claim: Claim, stop: threading.Event) -> None:
        logger.info(
            "worker %s claims job %s of tunedModels/%s, attempt %d",
            self._name,
            claim.job,
            claim.tuned_model,
            claim.attempt,
        )
        with Lease(self._queue, claim) as lease:
            try:
                if lease.cancelled.is_set() and not claim.recorded_steps:
                    raise Cancelled("The operation was cancelled before the first step was finished.")
                self._train(claim, lease, stop)
            except DatabaseUnavailable:
                raise  # it is not the job's fault
            except ApiError as error:
                logger.warning("job %s failed: %s", claim.job, error.message)
                self._queue.fail(claim, error)
                self._clean_up(claim)

    def _train(self, claim: Claim, lease: Lease, stop: threading.Event) -> None:
        model = self._catalog.get(f"models/{claim.base}")
        base = self._load(model)
        start = self._start(claim, base)
        form, limit = FORMATS[model.prompt_format], model.tuning_token_limit
        rows = examples.tokenize(claim.training_data.examples, form, base.tokenizer, limit)
        options = queue.training_options(claim.options)
        held_out = split.held_out(claim.training_data.examples, options, claim.seed)
        warnings = checks.of_rows(rows, form, base.tokenizer, limit, held_out)
        self._training.set()
        with TuningRun(
            base, rows, claim.hyperparameters, claim.seed, start=start, options=options, held_out=held_out
        ) as run:
            self._restore(claim, run)
            self._queue.describe(claim, _recipe(claim, base, run, len(rows), held_out), _messages(warnings))
            if self._to_the_end(claim, lease, stop, run):
                self._publish(claim, lease, stop, run)

    def _to_the_end(self, claim: Claim, lease: Lease, stop: threading.Event, run: TuningRun) -> bool:
        """Train; return whether for good, or whether the job was put back before its end."""
        if lease.cancelled.is_set() and run.step >= claim.recorded_steps:  # while it rested
            run.settle()
            return True
        pace, memory = Pace(run.total_steps), run.micro_batch_tokens
        checkpoints = Checkpoints(self._settings.checkpoint_seconds, claim.recorded_steps)
        for told in run:
            if lease.lost.is_set():
                raise LeaseLost(f"{self._name} no longer holds job {claim.job}")
            if run.micro_batch_tokens != memory:
                memory = self._tell_of_memory(claim, run, run.step, "Memory ran out.")
            if isinstance(told, Validation):
                self._queue.validated(claim, protos.TuningValidation(**asdict(told)))
                continue
            lease.heed(self._queue.record(claim, pace.message(told)))
            # Steps that an earlier attempt finished are done again even after a cancel: they were reported.
            if lease.cancelled.is_set() and run.step >= claim.recorded_steps:
                run.settle()
                return True
            if (stop.is_set() or lease.paused.is_set()) and not run.finished:
                self._checkpoint(claim, run, checkpoints)
                self._queue.put_back(claim)
                return False
            if not run.finished and checkpoints.due(run.step):
                self._checkpoint(claim, run, checkpoints)
        return True

    def _restore(self, claim: Claim, run: TuningRun) -> None:
        """Go on from the last checkpoint, with less memory when the process before was killed."""
        if claim.checkpoint:
            try:
                run.restore(self._artifacts.read(claim.checkpoint))
            except NotFound as error:
                what = f"The last checkpoint cannot be used: {error.message} Training begins anew."
                self._warn(claim, "checkpoint_lost", what)
        run.micro_batch_tokens = claim.micro_batch_tokens or run.micro_batch_tokens
        if claim.fruitless:
            run.be_frugal(one_by_one=claim.fruitless > 1)
            if run.micro_batch_tokens != claim.micro_batch_tokens:
                why = "The training process ended before it finished a step, perhaps for want of memory."
                self._tell_of_memory(claim, run, run.step + 1, why)

    def _tell_of_memory(self, claim: Claim, run: TuningRun, step: int, why: str) -> int:
        """Tell and store how many tokens go through the model at once from now on; return it."""
        most = run.micro_batch_tokens
        what = f"{why} From step {step} on a batch goes through the model in parts of at most "
        what += f"{most:,} tokens." if most > 1 else "one example."
        what += " The results are the same up to rounding, and training is slower; shorter examples need less."
        self._warn(claim, "micro_batch", what, most)
        return most

    def _warn(self, claim: Claim, kind: str, message: str, micro_batch_tokens: int | None = None) -> None:
        logger.warning("job %s: %s", claim.job, message)
        self._queue.warn(claim, protos.DataWarning(kind=kind, message=message), micro_batch_tokens)

    def _start(self, claim: Claim, base: Base) -> dict[str, bytes] | None:
        """Return the files of the adapter that a job starts from.

        Raises:
            FailedPrecondition: It was trained on other weights, or with another prompt format.
        """
        if claim.start is None:
            return None
        manifest, model = self._artifacts.manifest(claim.start), base.weights.model
        for field, own in (("weights_sha256", base.weights.sha256), ("prompt_format", model.prompt_format)):
            if manifest.get(field) != own:
                raise FailedPrecondition(
                    f"The parent's adapter was trained with the {field} {manifest.get(field)!r}, and this "
                    f"machine's models/{model.id} has {own!r}: tune the parent again, or the base model."
                )
        return self._artifacts.read(claim.start)

    def _clean_up(self, claim: Claim | GivenUp) -> None:
        """Remove what a job that failed has stored, and what was kept for it."""
        self._artifacts.delete(_folder(claim))
        self._release(claim)

    def _release(self, claim: Claim | GivenUp) -> None:
        """Remove the adapter that the job started from when its model was deleted meanwhile."""
        if claim.start:
            sweep_model(self._queue.database, self._artifacts, claim.start.split("/")[1])

    def _checkpoint(self, claim: Claim, run: TuningRun, checkpoints: Checkpoints) -> None:
        """Make a checkpoint; when it cannot be stored, training goes on, and the one before stays."""
        began, about = time.monotonic(), {"kind": "checkpoint", "step": run.step}
        name, note = f"checkpoint-{claim.attempt}-{run.step}", partial(self._queue.checkpointed, step=run.step)
        try:
            self._store(claim, name, run.checkpoint(), about, note)
            checkpoints.failing = False
        except NotStored as error:
            if not checkpoints.failing:
                what = f"The checkpoint after step {run.step} was not stored: {error.reason}. Training goes on; "
                what += "after an interruption it would repeat more steps."
                self._warn(claim, "checkpoint_not_stored", what)
            checkpoints.failing = True
        checkpoints.made(time.monotonic() - began)

    def _publish(self, claim: Claim, lease: Lease, stop: threading.Event, run: TuningRun) -> None:
        """Store the adapter and end the job; while there is no space for it, wait, and stay ready to leave."""
        error, stopped_at = None, run.step if run.step < run.total_steps else None
        if not run.finished:
            error = Cancelled(
                f"The operation was cancelled after step {run.step} of {run.total_steps}. The model is usable "
                "with the weights it had then, but unpredictable; delete it when you do not need it."
            )
        files, finish = run.files(), partial(self._queue.finish, error=error, stopped_at=stopped_at)
        about = {**run.manifest(), "started_from": claim.start}
        pause = POLL_SECONDS
        while True:
            try:
                self._store(claim, f"adapter-{claim.attempt}", files, about, finish)
                break
            except NotStored as failure:
                if pause == POLL_SECONDS:
                    what = f"Training is done, but its adapter was not stored: {failure.reason}. It will be tried "
                    self._warn(claim, "adapter_not_stored", f"{what}again until it succeeds.")
            if not self._rests(claim, lease, stop, pause):
                return
            pause = min(2 * pause, LONGEST_PAUSE)
        self._release(claim)
        logger.info("job %s: tunedModels/%s is ACTIVE", claim.job, claim.tuned_model)

    def _rests(self, claim: Claim, lease: Lease, stop: threading.Event, seconds: float) -> bool:
        """Wait; return False when the job was put back meanwhile, because the worker or the job is to stop."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if lease.lost.is_set():
                raise LeaseLost(f"{self._name} no longer holds job {claim.job}")
            if stop.wait(POLL_SECONDS) or lease.paused.is_set():
                self._queue.put_back(claim)
                return False
        return True

    def _store(
        self,
        claim: Claim,
        name: str,
        files: Mapping[str, bytes],
        about: Mapping[str, Any],
        note: Callable[[Claim, str], None],
    ) -> None:
        """Publish an artifact of the job, note it in the database, and only then remove older ones."""
        path = f"{_folder(claim)}/{name}"
        self._artifacts.publish(path, files, about)
        try:
            note(claim, path)
        except LeaseLost:
            self._artifacts.delete(path)
            raise
        for other in self._artifacts.children(_folder(claim)):
            if other != name:
                self._artifacts.delete(f"{_folder(claim)}/{other}")


def _folder(claim: Claim | GivenUp) -> str:
    return f"tunedModels/{claim.tuned_model}/{claim.job}"


def _recipe(claim: Claim, base: Base, run: TuningRun, rows: int, held_out: Sequence[int]) -> protos.TuningRecipe:
    """Return how a job is trained, as it is told."""
    weights, others = base.weights, asdict(run.recipe)
    return protos.TuningRecipe(
        rank=others.pop("rank"),
        alpha=others.pop("alpha"),
        layers=sorted({path.rpartition(".")[2] for path in run.adapter.layers}),
        prompt_format=weights.model.prompt_format,
        seed=claim.seed,
        base_model=f"models/{weights.model.id}",
        weights_sha256=weights.sha256,
        hyperparameters=claim.hyperparameters,
        training_rows=rows - len(held_out),
        held_out_rows=held_out,
        others={name: str(value) for name, value in others.items()},
    )


def _messages(warnings: Sequence[checks.DataWarning]) -> list[protos.DataWarning]:
    return [protos.DataWarning(**asdict(warning)) for warning in warnings]
