"""Accounts take turns in the job queue, and none may fill it."""

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from databases import each_database
from tunesmith import protos
from tunesmith.auth.accounts import Accounts
from tunesmith.errors import ResourceExhausted
from tunesmith.jobs import queue
from tunesmith.jobs.places import places
from tunesmith.jobs.queue import Claim, JobQueue
from tunesmith.store.database import Database
from tunesmith.store.tables import Job, TunedModel

ACCOUNTS = ("ada@x", "bob@x", "eve@x")
STEPS = 4


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    for database in each_database(request.param, tmp_path):
        for account in ACCOUNTS:
            Accounts(database).create(account)
        yield database


@pytest.fixture
def jobs(database: Database) -> JobQueue:
    return JobQueue(database, lease_seconds=60)


def enqueue(database: Database, account: str, count: int, start: float = 0.0, most: int = 0) -> None:
    """Add jobs as a create does, oldest first; their names begin with the account's."""
    for number in range(count):
        name, time = f"{account[:3]}-{start + number:g}", start + number
        with database.write() as session:
            queue.check_room(session, account, most)
            message = protos.TunedModel(name=f"tunedModels/{name}", state=protos.TunedModel.CREATING)
            model = TunedModel(
                id=name,
                owner=account,
                base="tiny",
                message=message.SerializeToString(),
                state=message.state,
                create_time=time,
            )
            session.add(model)
            session.flush()
            job = Job(
                id=f"job-{name}",
                tuned_model=name,
                state="queued",
                training_data=b"",
                seed=0,
                total_steps=STEPS,
                create_time=time,
                account=account,
            )
            session.add(job)


def claim(jobs: JobQueue, worker: str = "w") -> Claim:
    claimed = jobs.claim(worker)
    assert claimed is not None
    return claimed


def served(jobs: JobQueue, count: int) -> list[str]:
    """Do so many jobs one after the other, as one worker; return their names."""
    done = []
    for _ in range(count):
        claimed = claim(jobs)
        jobs.finish(claimed, "adapter")
        done.append(claimed.tuned_model)
    return done


def test_fifty_jobs_of_one_account_do_not_delay_anothers_first(database: Database, jobs: JobQueue) -> None:
    enqueue(database, "ada@x", 50)
    assert served(jobs, 2) == ["ada-0", "ada-1"]
    enqueue(database, "bob@x", 1, start=100)
    assert served(jobs, 2) == ["bob-100", "ada-2"]


def test_accounts_take_turns_each_oldest_first(database: Database, jobs: JobQueue) -> None:
    for start, account in enumerate(ACCOUNTS):
        enqueue(database, account, 3, start=10.0 * start)
    order = ["ada-0", "bob-10", "eve-20", "ada-1", "bob-11", "eve-21", "ada-2", "bob-12", "eve-22"]
    assert served(jobs, 9) == order


def test_who_has_the_fewest_running_comes_first(database: Database, jobs: JobQueue) -> None:
    enqueue(database, "ada@x", 4)
    enqueue(database, "bob@x", 4, start=10)
    running = [claim(jobs, f"w{number}") for number in range(4)]
    assert [one.tuned_model for one in running] == ["ada-0", "bob-10", "ada-1", "bob-11"]
    jobs.finish(running[0], "adapter")
    jobs.finish(running[2], "adapter")
    assert [claim(jobs, f"v{number}").tuned_model for number in range(2)] == ["ada-2", "ada-3"]


def test_deleting_what_is_done_wins_no_turn(database: Database, jobs: JobQueue) -> None:
    enqueue(database, "bob@x", 1)
    served(jobs, 1)
    with database.write() as session:
        session.delete(session.get_one(TunedModel, "bob-0"))
    enqueue(database, "ada@x", 1, start=20)
    enqueue(database, "bob@x", 1, start=10)
    assert served(jobs, 2) == ["ada-20", "bob-10"]


def test_a_job_stays_its_makers_when_the_model_is_given_away(database: Database, jobs: JobQueue) -> None:
    enqueue(database, "ada@x", 2)
    with database.write() as session:
        session.get_one(TunedModel, "ada-0").owner = "bob@x"
    enqueue(database, "bob@x", 1, start=10)
    assert served(jobs, 3) == ["ada-0", "bob-10", "ada-1"]


def test_what_was_begun_goes_on_first(database: Database, jobs: JobQueue) -> None:
    enqueue(database, "ada@x", 1)
    begun = claim(jobs)
    enqueue(database, "bob@x", 1, start=10)
    jobs.put_back(begun)
    assert served(jobs, 2) == ["ada-0", "bob-10"]


def test_many_workers_at_once_share_fairly_and_take_no_job_twice(database: Database, jobs: JobQueue) -> None:
    for start, account in enumerate(ACCOUNTS):
        enqueue(database, account, 8, start=100.0 * start)
    claimed, lock, begin = list[str](), threading.Lock(), threading.Barrier(6)

    def work(worker: str) -> None:
        begin.wait(30)
        for _ in range(2):
            name = claim(jobs, worker).tuned_model
            with lock:
                claimed.append(name)

    threads = [threading.Thread(target=work, args=(f"w{number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(claimed)) == 12
    shares = Counter(name[:3] for name in claimed)
    # On PostgreSQL workers that look at the same moment may see the same account's turn.
    assert min(shares.values()) >= (4 if database.in_process else 2), shares


def test_an_account_has_so_many_jobs_waiting_and_no_more(database: Database, jobs: JobQueue) -> None:
    enqueue(database, "ada@x", 3, most=3)
    with pytest.raises(ResourceExhausted) as refused:
        enqueue(database, "ada@x", 1, start=10, most=3)
    assert "queued_jobs_per_account" in refused.value.message
    assert refused.value.retry_seconds
    enqueue(database, "bob@x", 1, start=20, most=3)  # it is no one else's limit
    claim(jobs)  # one that runs does not wait
    enqueue(database, "ada@x", 1, start=30, most=3)


def test_of_two_creates_at_once_only_one_is_the_last_that_fits(database: Database) -> None:
    begin, outcomes = threading.Barrier(6), list[str]()

    def create(number: int) -> None:
        begin.wait(30)
        try:
            enqueue(database, "ada@x", 1, start=number, most=2)
            outcomes.append("made")
        except ResourceExhausted:
            outcomes.append("refused")

    threads = [threading.Thread(target=create, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert Counter(outcomes) == {"made": 2, "refused": 4}


def test_places_are_told_in_the_order_of_claims(database: Database, jobs: JobQueue) -> None:
    enqueue(database, "ada@x", 4)
    enqueue(database, "bob@x", 2, start=0.5)
    enqueue(database, "eve@x", 3, start=0.25)
    claim(jobs)
    begun = claim(jobs)
    jobs.put_back(begun)
    with database.read() as session:
        expected = places(session)
    assert [place.position for place in expected.values()] == [1, 2, 3, 4, 5, 6, 7, 8]
    claimed = [claim(jobs).job for _ in expected]
    assert claimed == [*expected]
    assert claimed[0] == begun.job


def test_a_running_job_tells_when_the_next_one_begins(database: Database, jobs: JobQueue) -> None:
    enqueue(database, "ada@x", 3)
    running = claim(jobs)
    with database.read() as session:
        assert {place.eta_seconds for place in places(session).values()} == {None}
    jobs.record(running, protos.TuningStep(step=1, seconds=0.5, eta_seconds=60))
    with database.read() as session:
        first, second = places(session).values()
    assert first.eta_seconds is not None
    assert second.eta_seconds is not None
    assert 55 < first.eta_seconds <= 60
    assert second.eta_seconds - first.eta_seconds == pytest.approx(0.5 * STEPS)
