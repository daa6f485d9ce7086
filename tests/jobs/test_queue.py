"""The queue on a real SQLite file: leases, fencing, cancel."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith import protos
from tunesmith.auth.accounts import Accounts
from tunesmith.errors import Cancelled, FailedPrecondition
from tunesmith.jobs import queue
from tunesmith.jobs.queue import Claim, GivenUp, JobQueue, LeaseLost
from tunesmith.store import events
from tunesmith.store.database import Database
from tunesmith.store.tables import Job, Report, Snapshot, TunedModel

ACTIVE, FAILED = protos.TunedModel.ACTIVE, protos.TunedModel.FAILED


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'test.db'}")
    database.migrate()
    Accounts(database).create("ada@example.com")
    yield database
    database.close()


def enqueue(database: Database, name: str, create_time: float = 0.0) -> None:
    with database.write() as session:
        message = protos.TunedModel(name=f"tunedModels/{name}", state=protos.TunedModel.CREATING)
        session.add(
            TunedModel(
                id=name,
                owner="ada@example.com",
                base="tiny",
                message=message.SerializeToString(),
                state=message.state,
                create_time=create_time,
            )
        )
        session.flush()
        session.add(
            Job(
                id=f"job-{name}",
                tuned_model=name,
                state="queued",
                training_data=b"",
                seed=0,
                total_steps=4,
                create_time=create_time,
            )
        )


class Clocks:
    """A machine's: what it takes for the time of day, and how long it has run."""

    def __init__(self, time: float = 1e9) -> None:
        self.time, self.seconds = time, 0.0

    def queue(self, database: Database, lease_seconds: float = 60) -> JobQueue:
        return JobQueue(database, lease_seconds, lambda: self.time, lambda: self.seconds)

    def go_on(self, seconds: float) -> None:
        self.time, self.seconds = self.time + seconds, self.seconds + seconds


def look(jobs: JobQueue, clocks: Clocks, worker: str, seconds: float) -> Claim | None:
    """Look for a job once a second as a worker does, until there is one or the time is over."""
    for _ in range(round(seconds)):
        if claim := jobs.claim(worker):
            return held(claim)
        clocks.go_on(1)
    return None


def step(number: int, mean_loss: float) -> protos.TuningStep:
    return protos.TuningStep(step=number, mean_loss=mean_loss, seconds=0.5, eta_seconds=8.0)


def held(claim: Claim | GivenUp | None) -> Claim:
    assert isinstance(claim, Claim)
    return claim


def job_of(database: Database, name: str) -> Job:
    with database.read() as session:
        return session.scalars(select(Job).where(Job.tuned_model == name)).one()


def state_of(database: Database, name: str) -> int:
    with database.read() as session:
        return session.get_one(TunedModel, name).state


def test_jobs_are_claimed_once_and_oldest_first(database: Database) -> None:
    jobs = JobQueue(database, lease_seconds=60)
    for name, time in (("second", 2.0), ("first", 1.0)):
        enqueue(database, name, time)
    assert [held(jobs.claim("a")).tuned_model, held(jobs.claim("b")).tuned_model] == ["first", "second"]
    assert jobs.claim("c") is None


def test_many_workers_at_once_never_get_one_job_twice(database: Database) -> None:
    for number in range(20):
        enqueue(database, f"model-{number}")
    jobs, claimed, lock = JobQueue(database, lease_seconds=60), list[str](), threading.Lock()

    def work(worker: str) -> None:
        while claim := jobs.claim(worker):
            with lock:
                claimed.append(claim.job)

    threads = [threading.Thread(target=work, args=(f"w{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == sorted(f"job-model-{number}" for number in range(20))


def test_a_lease_that_ran_out_gives_the_job_to_another_and_fences_the_first_off(database: Database) -> None:
    enqueue(database, "x")
    clocks = Clocks()
    jobs = clocks.queue(database)
    first = held(jobs.claim("a"))
    jobs.record(first, step(1, 0.5))
    assert look(jobs, clocks, "b", 59) is None
    second = held(look(jobs, clocks, "b", 3))
    assert (second.job, second.attempt, second.recorded_steps) == (first.job, 2, 1)
    for write in (
        lambda: jobs.renew(first),
        lambda: jobs.record(first, step(2, 9.9)),
        lambda: jobs.checkpointed(first, "theirs", 2),
        lambda: jobs.finish(first, "theirs"),
        lambda: jobs.fail(first, Cancelled("no")),
        lambda: jobs.put_back(first),
    ):
        with pytest.raises(LeaseLost):
            write()
    jobs.record(second, step(1, 0.5))
    jobs.finish(second, "ours")
    with database.read() as session:
        model = session.get_one(TunedModel, "x")
        assert model.adapter == "ours"
        steps = protos.TunedModel.FromString(model.message).tuning_task.snapshots
        assert [(step.step, step.mean_loss) for step in steps] == [(1, 0.5)]
        assert session.scalars(select(Snapshot)).all() == []  # they are part of the message now


def test_renewing_keeps_the_job(database: Database) -> None:
    enqueue(database, "x")
    clocks = Clocks()
    jobs = clocks.queue(database)
    claim = held(jobs.claim("a"))
    for _ in range(4):
        assert look(jobs, clocks, "b", 50) is None
        assert not jobs.renew(claim).cancelled


def test_the_lease_of_a_dead_worker_ends_at_once(database: Database) -> None:
    enqueue(database, "x")
    jobs = JobQueue(database, lease_seconds=60)
    held(jobs.claim("a"))
    jobs.release("someone else")
    assert jobs.claim("b") is None
    jobs.release("a")
    assert held(jobs.claim("b")).attempt == 2


def test_a_job_that_never_gets_through_a_step_is_given_up(database: Database) -> None:
    enqueue(database, "poison")
    enqueue(database, "next", 1.0)
    jobs = JobQueue(database, lease_seconds=60)
    for worker in ("a", "b", "c"):
        assert held(jobs.claim(worker)).tuned_model == "poison"
        jobs.release(worker)
    assert jobs.claim("d") == GivenUp("job-poison", "poison", None)
    assert state_of(database, "poison") == FAILED
    status = protos.Status.FromString(job_of(database, "poison").error or b"")
    assert "ended 3 times in a row without finishing a step" in status.message
    assert held(jobs.claim("d")).tuned_model == "next"


def test_a_killed_worker_that_finished_steps_is_no_poison(database: Database) -> None:
    enqueue(database, "x")
    jobs = JobQueue(database, lease_seconds=60)
    for attempt in range(1, 20):
        claim = held(jobs.claim(f"w{attempt}"))
        jobs.record(claim, step(attempt, 0.1))
        jobs.release(claim.worker)
    assert held(jobs.claim("last")).attempt == 20


def test_putting_back_is_no_failed_attempt(database: Database) -> None:
    enqueue(database, "x")
    jobs = JobQueue(database, lease_seconds=60)
    for _ in range(5):
        jobs.put_back(held(jobs.claim("a")))
    assert held(jobs.claim("a")).attempt == 6


def cancel(database: Database, name: str) -> None:
    with database.write() as session:
        queue.cancel(session, session.get_one(Job, f"job-{name}"))


def test_cancelling_a_waiting_job_ends_it(database: Database) -> None:
    enqueue(database, "x")
    cancel(database, "x")
    assert JobQueue(database, 60).claim("a") is None
    assert state_of(database, "x") == FAILED
    assert protos.Status.FromString(job_of(database, "x").error or b"").code == 1


def test_cancelling_a_running_job_asks_its_worker(database: Database) -> None:
    enqueue(database, "x")
    jobs = JobQueue(database, 60)
    claim = held(jobs.claim("a"))
    cancel(database, "x")
    assert jobs.renew(claim).cancelled
    jobs.finish(claim, "partial", Cancelled("on the way"))
    assert state_of(database, "x") == ACTIVE
    assert protos.Status.FromString(job_of(database, "x").error or b"").code == 1
    cancel(database, "x")  # done stays done
    assert state_of(database, "x") == ACTIVE


def test_a_deleted_model_takes_its_job_along(database: Database) -> None:
    enqueue(database, "x")
    jobs = JobQueue(database, 60)
    claim = held(jobs.claim("a"))
    with database.write() as session:
        session.delete(session.get_one(TunedModel, "x"))
    with pytest.raises(LeaseLost):
        jobs.record(claim, step(1, 0.1))
    assert jobs.claim("b") is None


def told(database: Database, name: str) -> list[protos.TuningEvent]:
    with database.read() as session:
        return events.after(session, f"job-{name}", 0)


def kinds(database: Database, name: str) -> list[str | None]:
    return [event.WhichOneof("event") for event in told(database, name)]


def test_what_a_step_did_is_told_once(database: Database) -> None:
    enqueue(database, "x")
    jobs = JobQueue(database, 60)
    first = held(jobs.claim("a"))
    jobs.record(first, step(1, 0.5))
    jobs.validated(first, protos.TuningValidation(step=1, loss=0.4))
    jobs.checkpointed(first, "path", 1)
    jobs.record(first, step(2, 0.3))
    jobs.release("a")
    second = held(jobs.claim("b"))
    jobs.record(second, step(1, 0.5))
    jobs.validated(second, protos.TuningValidation(step=1, loss=0.4))
    jobs.checkpointed(second, "other", 1)
    jobs.record(second, step(2, 0.3))
    jobs.finish(second, "adapter")
    assert kinds(database, "x") == ["started", "step", "validation", "checkpoint", "step", "started", "finished"]
    assert [event.event_id for event in told(database, "x")] == [1, 2, 3, 4, 5, 6, 7]
    assert told(database, "x")[5].started.interruption == protos.TuningEvent.Started.WORKER_ENDED
    assert told(database, "x")[6].finished.completed_steps == 2


def change(database: Database, name: str, act: Callable[[Session, Job], None]) -> None:
    with database.write() as session:
        act(session, session.get_one(Job, f"job-{name}"))


def test_a_paused_job_is_passed_over_and_keeps_its_place(database: Database) -> None:
    for number, name in enumerate(("first", "second", "third")):
        enqueue(database, name, float(number))
    jobs = JobQueue(database, 60)
    change(database, "first", queue.pause)
    assert held(jobs.claim("a")).tuned_model == "second"
    change(database, "first", queue.resume)
    assert held(jobs.claim("b")).tuned_model == "first"
    assert kinds(database, "first") == ["paused", "resumed", "started"]
    assert told(database, "first")[2].started.interruption == protos.TuningEvent.Started.INTERRUPTION_UNSPECIFIED


def test_a_running_job_is_asked_to_rest_and_may_be_asked_not_to(database: Database) -> None:
    enqueue(database, "x")
    jobs = JobQueue(database, 60)
    claim = held(jobs.claim("a"))
    assert jobs.record(claim, step(1, 0.5)) == queue.Wishes(cancelled=False, paused=False)
    change(database, "x", queue.pause)
    assert jobs.renew(claim) == jobs.record(claim, step(2, 0.5)) == queue.Wishes(cancelled=False, paused=True)
    change(database, "x", queue.resume)
    assert not jobs.record(claim, step(3, 0.5)).paused
    change(database, "x", queue.pause)
    jobs.put_back(claim)
    assert jobs.claim("b") is None
    assert kinds(database, "x")[-1] == "paused"
    change(database, "x", queue.resume)
    assert held(jobs.claim("b")).attempt == 2
    assert told(database, "x")[-1].started.interruption == protos.TuningEvent.Started.PAUSED


def test_a_job_whose_worker_dies_before_it_rests_rests(database: Database) -> None:
    enqueue(database, "x")
    jobs = JobQueue(database, 60)
    held(jobs.claim("a"))
    change(database, "x", queue.pause)
    jobs.release("a")
    assert jobs.claim("b") is None
    assert kinds(database, "x") == ["started", "paused"]
    assert jobs.claim("b") is None
    assert kinds(database, "x") == ["started", "paused"]


def test_a_cancelled_job_rests_no_longer(database: Database) -> None:
    enqueue(database, "x")
    jobs = JobQueue(database, 60)
    claim = held(jobs.claim("a"))
    jobs.record(claim, step(1, 0.5))
    change(database, "x", queue.pause)
    jobs.put_back(claim)
    change(database, "x", queue.cancel)
    with pytest.raises(FailedPrecondition, match="was cancelled"):
        change(database, "x", queue.pause)
    last = held(jobs.claim("b"))
    assert last.cancelled
    jobs.finish(last, "adapter", Cancelled("enough"))
    assert told(database, "x")[-1].finished.reason == "enough"
    with pytest.raises(FailedPrecondition, match="is done"):
        change(database, "x", queue.resume)


def test_training_that_ends_early_is_done(database: Database) -> None:
    enqueue(database, "x")
    jobs = JobQueue(database, 60)
    claim = held(jobs.claim("a"))
    jobs.record(claim, step(1, 0.5))
    jobs.finish(claim, "adapter", stopped_at=1)
    assert job_of(database, "x").total_steps == 1
    assert "after step 1 of 4" in told(database, "x")[-1].finished.reason
    assert job_of(database, "x").error is None


def test_how_a_job_is_trained_is_stored_once(database: Database) -> None:
    enqueue(database, "x")
    jobs = JobQueue(database, 60)
    claim = held(jobs.claim("a"))
    for rank in (16, 8):
        jobs.describe(claim, protos.TuningRecipe(rank=rank), [protos.DataWarning(kind="input_cut")])
    assert kinds(database, "x") == ["started", "warning"]
    with database.read() as session:
        stored = protos.TuningReport.FromString(session.get_one(Report, "job-x").message)
    assert stored.recipe.rank == 16


HOUR = 3600.0


@pytest.mark.parametrize("jump", [HOUR, -HOUR])
def test_a_clock_that_jumps_ends_no_lease_early_or_late(database: Database, jump: float) -> None:
    enqueue(database, "x")
    clocks = Clocks()
    jobs = clocks.queue(database)
    claim = held(jobs.claim("a"))
    assert jobs.claim("b") is None
    clocks.time += jump
    assert look(jobs, clocks, "b", 30) is None
    jobs.renew(claim)
    assert look(jobs, clocks, "b", 59) is None
    assert held(look(jobs, clocks, "b", 3)).attempt == 2


@pytest.mark.parametrize("ahead", [HOUR, -HOUR])
def test_machines_whose_clocks_differ_leave_each_others_jobs_alone(database: Database, ahead: float) -> None:
    enqueue(database, "x")
    here, there = Clocks(), Clocks(1e9 + ahead)
    mine, theirs = here.queue(database), there.queue(database)
    claim = held(mine.claim("a"))
    for _ in range(10):
        assert look(theirs, there, "b", 12) is None
        here.go_on(12)
        mine.renew(claim)
    second = held(look(theirs, there, "b", 62))
    with pytest.raises(LeaseLost):
        mine.renew(claim)
    assert look(mine, here, "a", 30) is None
    theirs.finish(second, "adapter")


def test_who_was_away_for_long_does_not_take_others_jobs(database: Database) -> None:
    """A frozen machine, or a database that was locked: nobody could renew a lease."""
    enqueue(database, "x")
    clocks = Clocks()
    jobs = clocks.queue(database)
    claim = held(jobs.claim("a"))
    assert jobs.claim("b") is None
    clocks.go_on(1000)
    assert jobs.claim("b") is None
    jobs.renew(claim)


def test_turns_go_on_when_the_clock_is_set_back(database: Database) -> None:
    Accounts(database).create("bob@example.com")
    for number in range(6):
        enqueue(database, f"m{number}", float(number))
        with database.write() as session:
            account = ("ada", "bob")[number % 2]
            session.get_one(Job, f"job-m{number}").account = f"{account}@example.com"
    clocks = Clocks()
    jobs, order = clocks.queue(database), list[str]()
    for _ in range(6):
        claim = held(jobs.claim("a"))
        order.append(claim.tuned_model)
        jobs.finish(claim, "adapter")
        clocks.time -= HOUR
    assert order == [f"m{number}" for number in range(6)]


def test_steps_that_are_repeated_bring_a_job_no_further(database: Database) -> None:
    """Or one that kills its worker at a later step would never end."""
    enqueue(database, "x")
    jobs = JobQueue(database, 60)
    for fruitless in (0, 0, 1, 2):
        claim = held(jobs.claim("a"))
        assert claim.fruitless == fruitless
        jobs.record(claim, step(1, 0.5))
        jobs.record(claim, step(2, 0.5))
        jobs.release("a")
    assert isinstance(jobs.claim("a"), GivenUp)


def test_a_job_that_is_killed_while_it_repeats_steps_is_no_poison(database: Database) -> None:
    enqueue(database, "x")
    jobs = JobQueue(database, 60)
    claim = held(jobs.claim("a"))
    for number in (1, 2, 3):
        jobs.record(claim, step(number, 0.5))
    jobs.release("a")
    for _ in range(10):
        jobs.record(held(jobs.claim("a")), step(1, 0.5))
        jobs.release("a")
    assert held(jobs.claim("a")).fruitless == 0


def test_what_memory_allows_is_kept(database: Database) -> None:
    enqueue(database, "x")
    jobs = JobQueue(database, 60)
    claim = held(jobs.claim("a"))
    jobs.warn(claim, protos.DataWarning(kind="micro_batch", message="less"), 128)
    jobs.put_back(claim)
    assert held(jobs.claim("b")).micro_batch_tokens == 128
    assert [event.warning.kind for event in told(database, "x") if event.HasField("warning")] == ["micro_batch"]
