"""A tuning job as it goes on: a live bar in a terminal, lines where there is none."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

PACE_STEPS = 10
"""Steps whose speed is shown: a single one says more of its examples than of the machine."""
WAITING = "Waiting for a worker"
REFRESHES = 4  # a second
LINES = 10
"""Steps that are told where there is no terminal."""
_INTERRUPTIONS = {
    "WORKER_ENDED": "The worker's process ended",
    "WORKER_LOST": "The worker did not answer any more",
    "SERVER_STOPPED": "The server stopped",
}


@dataclass
class Job:
    """What the events of a job have said so far.

    Attributes:
        state: What it is doing, in words.
        losses: Of each step.
        validation: The newest one.
        best: The one with the lowest loss.
        total_steps: 0 until a worker took it up.
        finished: The event that ended it; empty before.
    """

    state: str = WAITING
    losses: dict[int, float] = field(default_factory=dict)
    validation: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    total_steps: int = 0
    finished: dict[str, Any] = field(default_factory=dict)
    away: bool = False
    _position: int = 0
    _eta: tuple[float, float] | None = None  # seconds that were left, and when that was said
    _pace: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=PACE_STEPS))

    @property
    def step(self) -> int:
        """The last finished step."""
        return next(reversed(self.losses), 0)

    @property
    def left(self) -> float | None:
        """Seconds until it begins or ends, as of now; None when nobody knows."""
        if self._eta is None:
            return None
        seconds, since = self._eta
        return max(0.0, seconds - (time.monotonic() - since))

    def details(self) -> str:
        """Return the figures of now, in one line."""
        if self.away:
            return "the server does not answer; trying again"
        parts = []
        if self.losses and self.state != WAITING:
            parts.append(f"loss {self.losses[self.step]:.3f}")
        if self.validation:
            parts.append(f"validation {self.validation.get('loss', 0.0):.3f}")
        if self._pace and (seconds := sum(seconds for _, seconds in self._pace)):
            parts.append(f"{sum(tokens for tokens, _ in self._pace) / seconds:,.0f} tokens/s")
        if self._position and self.state == WAITING:
            parts.append(f"place {self._position} in the queue")
            if self.left is not None:
                parts.append(f"begins in about {span(self.left)}")
        elif self.left is not None and self.left >= 1:
            parts.append(f"{span(self.left)} left")
        return " · ".join(parts)

    def take(self, event: dict[str, Any] | None) -> str | None:
        """Take note of an event; return its kind. None is a server that is away for the moment."""
        self.away = event is None
        if event is None:
            return None
        kind = next((kind for kind in event if kind not in ("eventId", "time")), "")
        handler: Callable[[dict[str, Any]], None] | None = getattr(self, f"_take_{kind}", None)
        if handler:
            handler(event[kind])
        return kind

    def _take_queued(self, told: dict[str, Any]) -> None:
        self.state, self._position = WAITING, told.get("position", 0)
        self._say_left(told)

    def _take_started(self, told: dict[str, Any]) -> None:
        self.state, self.total_steps, self._eta = "Tuning", told["totalSteps"], None
        self._pace.clear()

    def _take_step(self, told: dict[str, Any]) -> None:
        self.state = "Tuning"
        self.losses[told["step"]] = told.get("meanLoss", 0.0)
        self._pace.append((told.get("tokens", 0), told.get("seconds", 0.0)))
        self._say_left(told)

    def _take_validation(self, told: dict[str, Any]) -> None:
        self.validation = told
        if told.get("best"):
            self.best = told

    def _take_paused(self, _told: dict[str, Any]) -> None:
        self.state, self._eta = "Paused", None

    def _take_resumed(self, _told: dict[str, Any]) -> None:
        self.state = WAITING

    def _take_finished(self, told: dict[str, Any]) -> None:
        self.finished, self._eta = told, None
        self.state = "Tuned" if told.get("state") == "ACTIVE" else "Ended"

    def _say_left(self, told: dict[str, Any]) -> None:
        seconds = told.get("etaSeconds")
        self._eta = None if seconds is None else (seconds, time.monotonic())


def show_tuning(
    console: Console,
    events: Iterable[dict[str, Any] | None],
    name: str = "MODEL",
    located: Callable[[str], str] = str,
) -> Job:
    """Show a job's events until it is done; return what they said.

    Args:
        console: Where to.
        events: As `Client.events` yields them.
        name: The tuned model's, for what to type.
        located: Puts into the server's words what the person calls the examples.
    """
    job = Job()
    with _Bar(job, console) if console.is_terminal else nullcontext(_Lines(job, console)) as screen:
        for event in events:
            kind = job.take(event)
            for note in _notes(kind, event, name, located):
                console.print(note, soft_wrap=not console.is_terminal)
            screen.show()
    return job


def _notes(
    kind: str | None, event: dict[str, Any] | None, name: str, located: Callable[[str], str]
) -> Iterator[RenderableType]:
    """Yield what stays on the screen of an event."""
    about = event[kind] if event and kind else {}
    if kind == "warning":
        yield warning(about, located)
    elif kind == "validation":
        yield Text(validation(about))
    elif kind == "paused":
        yield Text(f"Paused after step {about.get('completedSteps', 0)}. Go on:  tunesmith resume {name}")
    elif kind == "started" and (reason := _INTERRUPTIONS.get(about.get("interruption", ""))):
        yield Text(f"{reason}; attempt {about.get('attempt', 0)} goes on from the last checkpoint.")


def warning(about: dict[str, Any], located: Callable[[str], str]) -> Text:
    """Return a warning about the training data as text."""
    message = about.get("message") or f"{about['kind']}: {_named(about.get('rows', []))}"
    text = located(message)
    return Text.assemble(("! ", "bold yellow"), text[:1].upper() + text[1:])


def _named(rows: list[int]) -> str:
    return ", ".join(f"examples[{row}]" for row in rows) or "the examples as a whole"


def validation(about: dict[str, Any]) -> str:
    """Return a validation as a line of text."""
    tokens, answers = about.get("tokenAccuracy", 0.0), about.get("exactMatch", 0.0)
    best = " · best" if about.get("best") else ""
    return (
        f"epoch {about.get('epoch', 0)} · validation loss {about.get('loss', 0.0):.3f} · "
        f"right: {tokens:.0%} of tokens, {answers:.0%} of answers{best}"
    )


def span(seconds: float) -> str:
    """Return a span of time for a person: 0:07, 12:05, 1:02:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _Bar(Progress):
    """A live bar, and below it the figures of now."""

    def __init__(self, job: Job, console: Console) -> None:
        columns = [
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[count]}"),
        ]
        self._job = job
        super().__init__(*columns, console=console, expand=True, refresh_per_second=REFRESHES)
        self._bar = self.add_task(job.state, total=None, count="")

    def get_renderables(self) -> Iterator[RenderableType]:
        """Yield the bar, then the figures; called whenever it is drawn."""
        table: Table = self.make_tasks_table(self.tasks)
        yield table
        yield Text(self._job.details(), style="dim", no_wrap=True, overflow="ellipsis")

    def show(self) -> None:
        """Show what the job has come to."""
        job = self._job
        total = job.total_steps or None
        count = f"step {job.step}/{job.total_steps}" if total else ""
        self.update(self._bar, description=job.state, total=total, completed=job.step, count=count)


class _Lines:
    """A line for what is new, and for every tenth of the steps."""

    def __init__(self, job: Job, console: Console) -> None:
        self._job, self._console = job, console
        self._step, self._last = 0, ""

    def show(self) -> None:
        """Print what the job has come to, if it is worth a line."""
        job = self._job
        line = self._last
        if job.away or job.state == WAITING:
            line = f"{job.state}: {job.details()}"
        elif job.state in ("Tuning", "Tuned", "Ended") and self._is_due():
            self._step = job.step
            line = f"step {job.step}/{job.total_steps} · {job.details()}"
        if line != self._last:
            self._last = line
            self._console.print(line, highlight=False, soft_wrap=True)

    def _is_due(self) -> bool:
        job = self._job
        if job.finished:
            return job.step > self._step
        return job.step * LINES // max(1, job.total_steps) > self._step * LINES // max(1, job.total_steps)
