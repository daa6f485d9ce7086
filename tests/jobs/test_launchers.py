"""Workers start and end with their server; one that is still starting holds up nobody."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from sqlalchemy import select

from servers import Server, command, job, losses
from tunesmith.jobs.launchers import LocalLauncher
from tunesmith.jobs.queue import JobQueue
from tunesmith.store.database import Database
from tunesmith.store.tables import Job


def test_a_server_that_stops_waits_for_its_workers(tiny: dict[str, str], data_dir: Path) -> None:
    with Server(data_dir, tiny, "--workers", "2") as server:
        children = Path(f"/proc/{server.process.pid}/task").glob("*/children")
        workers = [int(pid) for child in children for pid in child.read_text().split()]
    assert len(workers) == 2
    assert server.process.returncode == 0  # not by the signal: it came to its end
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)


def test_a_job_that_waits_for_its_base_model_is_put_back_at_once(tiny: dict[str, str], data_dir: Path) -> None:
    lock = FileLock(Path(tiny["TUNESMITH_CACHE_DIR"]) / "models" / "smollm2-135m-instruct.lock")
    with lock, Server(data_dir, tiny) as server:  # as if another process was converting its weights
        operation = server.tune(job("other base", base_model="models/smollm2-135m-instruct"))
        server.until(operation, lambda _: "claims job" in Path(server.log.name).read_text())
    database = Database(f"sqlite:///{data_dir / 'tunesmith.db'}")
    with database.read() as session:
        [left] = session.scalars(select(Job))
    database.close()
    assert (left.state, left.fruitless_attempts) == ("queued", 0)


def test_a_worker_whose_server_is_gone_does_not_get_ready_first(tiny: dict[str, str], data_dir: Path) -> None:
    data_dir.mkdir()
    worker = [*command("worker"), "--data-dir", str(data_dir), "--log-level", "info", "--stop-with-stdin"]
    environment = {**os.environ, **tiny}
    for standing_in, ready in ((subprocess.DEVNULL, False), (subprocess.PIPE, True)):
        with subprocess.Popen(
            worker, env=environment, stdin=standing_in, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            said = any(" is ready" in line for line in process.stderr)
            if process.stdin is not None:
                process.stdin.close()
        assert (said, process.returncode) == (ready, 0)


STOPS_AT_STEP_5 = """
import sys
from pathlib import Path
from jobs import processes
from tunesmith.cli import main
processes.stops_in_a_transaction(5, Path(sys.argv.pop(1)))
main()
"""


def test_a_worker_that_is_stopped_while_it_locks_the_database_is_killed(
    tiny: dict[str, str], data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny | {"TUNESMITH_LEASE_SECONDS": "1", "TUNESMITH_DATABASE_WAIT_SECONDS": "0.5"}
    for name, value in (settings | {"PYTHONPATH": str(Path(__file__).parents[1])}).items():
        monkeypatch.setenv(name, value)
    once = data_dir.parent / "once"
    with Server(data_dir, settings, "--workers", "0") as server:
        database = Database(f"sqlite:///{data_dir / 'tunesmith.db'}")
        program = [sys.executable, "-c", STOPS_AT_STEP_5, str(once)]
        launcher = LocalLauncher(1, server.where(), JobQueue(database, lease_seconds=1), program)
        operation = server.tune(job(epochs=4))
        launcher.start()
        stopped = losses(server.finished(operation))
        assert once.exists()
        assert server.call("GET", f"{operation['metadata']['tunedModel']}:report")["timings"]["attempts"] == 2
        assert losses(server.finished(server.tune(job(epochs=4)))) == stopped
        launcher.stop()
        database.close()
