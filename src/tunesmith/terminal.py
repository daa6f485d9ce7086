"""What commands draw: progress bars, the loss curve, tables."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from tunesmith.base_models import weights
from tunesmith.base_models.catalog import BaseModel
from tunesmith.store.tables import AuditRecord

CURVE_ROWS = 8
CURVE_COLUMNS = 60
_EIGHTHS = " ▁▂▃▄▅▆▇█"


@contextmanager
def progress_bar(console: Console, *columns: str) -> Iterator[Progress]:
    """A live bar with a description, a percentage, the time and further columns in rich's template form."""
    bars = [TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()]
    with Progress(*bars, *map(TextColumn, columns), console=console) as progress:
        yield progress


def fetch_weights(console: Console, model: BaseModel, cache_dir: Any) -> weights.Weights:
    """Fetch a base model's weights, showing progress, unless they are in the cache."""
    if found := weights.find(model, cache_dir):
        return found
    console.print(
        f"Fetching [bold]{model.display_name}[/] once ({model.download_megabytes} MB) into {cache_dir}.\n"
        f"Its licence applies to what you do with it: {model.licence}",
        soft_wrap=True,
    )
    with progress_bar(console) as progress:
        task = progress.add_task("Fetching", total=1.0)

        def show(what: str, share: float) -> None:
            progress.update(task, description=what, completed=share)

        return weights.ensure(model, cache_dir, show)


@contextmanager
def download_bar(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A live bar for a download: call what it gives with the bytes that are there and with those in all."""
    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()]
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total or None)


def loss_curve(losses: Sequence[float], last_step: int | None = None) -> str:
    """Return the losses as a bar chart of text, the first step on the left.

    Args:
        losses: Of steps that are evenly spread.
        last_step: The last one's number; None: they are of all steps.
    """
    step = max(1, -(-len(losses) // CURVE_COLUMNS))
    means = [sum(losses[i : i + step]) / len(losses[i : i + step]) for i in range(0, len(losses), step)]
    width = max(1, min(4, CURVE_COLUMNS // len(means)))
    top = max(means) or 1.0
    lines = []
    for row in range(CURVE_ROWS, 0, -1):
        # How many eighths of this row's height each bar fills.
        filled = [min(8, max(0, round((mean / top * CURVE_ROWS - row + 1) * 8))) for mean in means]
        label = f"{top * row / CURVE_ROWS:6.2f} ┤"
        lines.append(label + "".join(_EIGHTHS[eighths] * width for eighths in filled))
    lines.append("  loss └" + "─" * (width * len(means)))
    lines.append(" " * 8 + "step 1" + f"{last_step or len(losses)}".rjust(max(1, width * len(means) - 6)))
    return "\n".join(lines)


def tuned_models_table(models: Iterable[dict[str, Any]]) -> Table:
    """Return the tuned models, a row each, times in local time."""
    table = Table(box=None, pad_edge=False)
    for column in ("NAME", "DISPLAY NAME", "STATE", "BASE MODEL", "LOSS", "CREATED"):
        table.add_column(column, no_wrap=column in ("NAME", "CREATED"))
    for model in models:
        snapshots = model["tuningTask"].get("snapshots")
        table.add_row(
            model["name"],
            model.get("displayName", ""),
            model["state"],
            model.get("baseModel", "").removeprefix("models/"),
            f"{snapshots[-1]['meanLoss']:.3f}" if snapshots else "",
            datetime.fromisoformat(model["createTime"]).astimezone().strftime("%Y-%m-%d %H:%M"),
        )
    return table


def audit_table(records: Iterable[AuditRecord]) -> Table:
    """Return what is on record, a row each, times in local time."""
    table = Table(box=None, pad_edge=False)
    for column in ("TIME", "WHO", "FROM", "DID", "OUTCOME"):
        table.add_column(column, overflow="fold", no_wrap=column in ("TIME", "OUTCOME"))
    for record in records:
        at = datetime.fromtimestamp(record.time).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        origin = ", ".join(filter(None, (record.address, record.credential)))
        did = f"{record.action} {record.resource}" + (f": {record.detail}" if record.detail else "")
        outcome = Text(record.outcome, "" if record.outcome == "OK" else "red")
        table.add_row(at, *map(Text, (record.account or "unknown", origin, did)), outcome)
    return table


def audit_line(record: AuditRecord) -> str:
    """Return a record as JSON, its time in UTC."""
    fields = ("account", "credential", "action", "resource", "outcome", "detail", "address", "project")
    at = datetime.fromtimestamp(record.time, UTC).isoformat(timespec="milliseconds")
    return json.dumps({"id": record.id, "time": at} | {field: getattr(record, field) for field in fields})
