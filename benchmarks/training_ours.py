"""Our side of the training benchmark: one job through the code that the worker uses, in a process of its own.

training.py runs it: python training_ours.py JOB RESULT
"""

import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from training_job import Job, Result, peak_bytes
from tunesmith import protos
from tunesmith.base_models import decoder, weights
from tunesmith.base_models.catalog import Catalog
from tunesmith.base_models.device import compute_dtype
from tunesmith.base_models.prompts import FORMATS
from tunesmith.config import Settings
from tunesmith.kernels.passes import TorchKernels
from tunesmith.training import examples
from tunesmith.training.examples import Row
from tunesmith.training.loop import Base, Recipe, Step, TuningRun
from tunesmith.training.network import freeze

PLAIN = Recipe(rank=16, alpha=16.0, clip_norm=1.0)
"""What TRL is told too."""


def main(job: Job) -> Result:
    """Train as the job says."""
    torch.set_num_threads(job.threads)
    settings = Settings.load()
    model = Catalog.load(settings).default
    base = load(weights.get(model, settings.cache_dir), job)
    pairs = [protos.TuningExample(text_input=text, output=output) for text, output in job.rows]
    given = protos.TuningExamples(examples=pairs)
    form = FORMATS[model.prompt_format]
    rows = examples.tokenize(given, form, base.tokenizer, model.tuning_token_limit)
    hyperparameters = protos.Hyperparameters(
        epoch_count=job.epochs, batch_size=job.batch_size, learning_rate=job.learning_rate
    )
    warm_up(base, rows, hyperparameters, job)
    losses: list[float] = []
    began = time.perf_counter()
    with TuningRun(base, rows, hyperparameters, job.seed, recipe=PLAIN) as run:
        for event in run:
            if isinstance(event, Step):
                losses.append(event.mean_loss)
            if job.steps and len(losses) == job.steps:
                break
        seconds = time.perf_counter() - began
    seen = [(row.prompt + row.output, row.learnt) for row in rows]
    return Result(seconds, losses, seen, peak_bytes(), {"torch": version("torch")})


def load(found: weights.Weights, job: Job) -> Base:
    """Load the base model as the worker does; in the job's precision when that is another."""
    device = torch.device("cpu")
    if job.bf16 == (compute_dtype(device) is torch.bfloat16):
        return Base.load(found, device)
    network = freeze(partial(decoder.load, found.path, device, torch.float32), TorchKernels())
    return Base(found, network, found.tokenizer(), device)


def warm_up(base: Base, rows: list[Row], hyperparameters: protos.Hyperparameters, job: Job) -> None:
    """Take one step of the job, and keep the weights that the adapter had before it for TRL."""
    with TuningRun(base, rows, hyperparameters, job.seed, recipe=PLAIN) as run:
        folder = Path(job.adapter)
        folder.mkdir(exist_ok=True)
        for name, content in run.adapter.to_files(base.weights.model.id).items():
            (folder / name).write_bytes(content)
        next(iter(run))


if __name__ == "__main__":
    main(Job.read(Path(sys.argv[1]))).write(Path(sys.argv[2]))
