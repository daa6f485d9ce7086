"""Workers start and end with their server; one that is still starting holds up nobody."""

import os
import subprocess
from pathlib import Path

import pytest
from filelock import FileLock
from sqlalchemy import select

from servers import Server, command, job
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
