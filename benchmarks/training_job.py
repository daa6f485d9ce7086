"""What one process of the training benchmark is asked to do and what it answers: JSON that both sides read."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self


@dataclass(frozen=True)
class Job:
    """One tuning job.

    Attributes:
        rows: Inputs and outputs.
        texts: The same as prompts and completions, which is how TRL takes them.
        sequence: The rows' numbers in the order in which they are trained on, epoch after epoch.
        steps: After how many steps to stop; 0: after the last.
        threads: Of torch.
        bf16: Whether the base model is in bfloat16, as we run it where the processor multiplies that.
        weights: The base model's directory.
        adapter: The directory for a new adapter's weights: we put them there, TRL starts from them.
    """

    rows: list[tuple[str, str]]
    texts: list[tuple[str, str]]
    sequence: list[int]
    batch_size: int
    epochs: int
    learning_rate: float
    seed: int
    steps: int
    threads: int
    bf16: bool
    weights: str
    adapter: str

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a job from a file."""
        return cls(**json.loads(path.read_text("utf-8")))

    def write(self, path: Path) -> None:
        """Write the job to a file."""
        path.write_text(json.dumps(asdict(self)), "utf-8")


@dataclass(frozen=True)
class Result:
    """How a job went.

    Attributes:
        seconds: From the first step's start to the last one's end.
        losses: Each step's, per output token, in nats.
        seen: Each row's token ids and how many of its tokens are targets, as the model got them.
        peak_bytes: The most memory that the process had in RAM.
        versions: Of the packages that did it.
    """

    seconds: float
    losses: list[float]
    seen: list[tuple[list[int], int]]
    peak_bytes: int
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a result from a file."""
        return cls(**json.loads(path.read_text("utf-8")))

    def write(self, path: Path) -> None:
        """Write the result to a file."""
        path.write_text(json.dumps(asdict(self)), "utf-8")


def peak_bytes(process: int | str = "self") -> int:
    """Return the most memory that a process has had in RAM, pages of mapped files included."""
    # Not getrusage: its figure outlives exec, so that a child starts with its parent's.
    status = Path(f"/proc/{process}/status").read_text("utf-8")
    return 1024 * int(status.partition("VmHWM:")[2].split(maxsplit=1)[0])
