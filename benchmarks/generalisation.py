"""How often a tuned model is right about what it was not shown, by recipe: the share of exact answers.

    python benchmarks/generalisation.py --recipe default --task numbers --seeds 5
    python benchmarks/generalisation.py --recipe plain --set rank=32,alpha=32 --task dates --seeds 3
    python benchmarks/generalisation.py --recipe product    # training.loop.TuningRun, as the service runs it
    python benchmarks/generalisation.py --recipe trl        # TRL and PEFT as they come; needs --trl-python
    python benchmarks/generalisation.py --recipe trl-api    # the same with the API's hyperparameters
    python benchmarks/generalisation.py --list

An answer counts when it is right in every token, its end too, each the likeliest after the ones before: this is
what greedy generation gives. The tasks are in tasks/. Recipes are chosen on the cases of the part `search`.
"""

import argparse
import json
import math
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from recipes import Trial, TrialRun, answers, prompt_format, rows_of, shape_of, take_over
from tunesmith import protos
from tunesmith.base_models.catalog import Catalog
from tunesmith.base_models.device import pick_device
from tunesmith.config import Settings
from tunesmith.terminal import fetch_weights
from tunesmith.training import split
from tunesmith.training.hyperparameters import Options, resolve
from tunesmith.training.loop import Base, Step, TuningRun

TASKS = Path(__file__).parent / "tasks"

API_SETTINGS = {"learning_rate": 0.001, "per_device_train_batch_size": 4, "num_train_epochs": 5}
"""The API's default hyperparameters as TRL calls them."""
OTHERS = ("product", "trl", "trl-api")
RECIPES: Mapping[str, Trial] = {
    "default": Trial(serve=0.6),
    "plain": Trial(),
    "gentle": Trial(alpha=8),
    "anchored": Trial(anchor=3),
    "held": Trial(hold=10),
}
"""The product's, for tasks too small to hold examples out; and those that others are one change away from."""


@dataclass(frozen=True)
class Task:
    """Examples to learn and cases that are not among them."""

    name: str
    train: list[dict[str, str]]
    cases: list[dict[str, str]]

    @classmethod
    def load(cls, name: str, part: str | None = None) -> "Task":
        """Read tasks/NAME.jsonl, with all held-out cases or those of one part."""
        lines = (TASKS / f"{name}.jsonl").read_text("utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        train = [row for row in rows if row["part"] == "train"]
        return cls(
            name, train, [row for row in rows if row["part"] in ((part,) if part else ("search", "report"))]
        )


@dataclass(frozen=True)
class Result:
    """What one seed came to.

    Attributes:
        right: For each case whether it was answered rightly.
        seconds: Of training.
        loss: Of the last step, in nats a token.
    """

    right: list[bool]
    seconds: float
    loss: float

    def share(self, cases: Sequence[Mapping[str, str]], **wanted: str) -> float:
        """Return the percentage of right answers among the cases that have these values."""
        among = [
            right
            for right, case in zip(self.right, cases, strict=True)
            if all(case.get(k) == v for k, v in wanted.items())
        ]
        return 100 * sum(among) / len(among) if among else math.nan


def load_base() -> Base:
    """Return the default base model."""
    settings = Settings.load()
    weights = fetch_weights(Console(stderr=True), Catalog.load(settings).default, settings.cache_dir)
    return Base.load(weights, pick_device("auto"))


def try_recipe(base: Base, task: Task, trial: Trial | None, seed: int) -> Result:
    """Tune with the API's default hyperparameters, by a recipe or, without one, as the service does."""
    form = prompt_format((trial and trial.form) or base.weights.model.prompt_format)
    rows, cases = rows_of(base.tokenizer, form, task.train), rows_of(base.tokenizer, form, task.cases)
    given = resolve(protos.Hyperparameters(), len(rows))
    if trial is None:
        pairs = [protos.TuningExample(text_input=row["text_input"], output=row["output"]) for row in task.train]
        held_out = split.held_out(protos.TuningExamples(examples=pairs), Options(), seed)
        made = TuningRun(base, rows, given, seed, held_out=held_out)
    else:
        made = TrialRun(base, rows, given, seed, trial)
    start, loss = time.perf_counter(), math.nan
    with made as run:
        for event in run:
            loss = event.mean_loss if isinstance(event, Step) else loss
        seconds = time.perf_counter() - start
        return Result(answers(run._network, cases, base.device), seconds, loss)


def try_trl(
    base: Base, task: Task, seeds: Sequence[int], python: str, settings: Mapping[str, Any]
) -> list[Result]:
    """Tune with TRL, in its own environment, on the same prompts; ask the adapters as ours are asked."""
    form = prompt_format(base.weights.model.prompt_format)
    before, after = (
        "".join(piece for piece in part if isinstance(piece, str)) for part in (form.before, form.after)
    )
    texts = [(before + row["text_input"] + after, form.answer + row["output"]) for row in task.train]
    cases = rows_of(base.tokenizer, form, task.cases)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        (out / "rows.json").write_text(json.dumps(texts), "utf-8")
        (out / "settings.json").write_text(json.dumps(settings), "utf-8")
        script = str(Path(__file__).with_name("trl_baseline.py"))
        files = (str(base.weights.path), str(out / "rows.json"), folder, str(out / "settings.json"))
        subprocess.run([python, script, *files, *map(str, seeds)], check=True)
        for seed in seeds:
            timing = json.loads((out / str(seed) / "timing.json").read_text("utf-8"))
            with base.network.adapted(*shape_of(out / str(seed))) as network:
                take_over(network, out / str(seed))
                results.append(Result(answers(network, cases, base.device), **timing))
    return results


def report(name: str, task: Task, results: Sequence[Result]) -> str:
    """Return a line: means over seeds, the extremes, and each group's mean."""

    def mean(**wanted: str) -> float:
        return statistics.mean(result.share(task.cases, **wanted) for result in results)

    every = [result.share(task.cases) for result in results]
    groups = dict.fromkeys(case["group"] for case in task.cases if "group" in case)
    seconds = statistics.mean(result.seconds for result in results)
    loss = statistics.mean(result.loss for result in results)
    return (
        f"{task.name:10} {name:44} search {mean(part='search'):5.1f} report {mean(part='report'):5.1f} "
        f"all {mean():5.1f} [{min(every):.1f}..{max(every):.1f}] {seconds:5.1f} s loss {loss:.3f} "
        + " ".join(f"{group[:4]} {mean(group=group):.0f}" for group in groups)
    )


def changed(trial: Trial, settings: str) -> Trial:
    """Return the recipe with `name=value,name=value` set."""
    kinds = {field.name: type(getattr(trial, field.name)) for field in fields(trial)}
    given: dict[str, Any] = {}
    for setting in filter(None, settings.split(",")):
        name, _, value = setting.partition("=")
        given[name] = kinds[name](value)
    return replace(trial, **given)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="default", choices=[*RECIPES, *OTHERS])
    parser.add_argument("--set", default="", help="what to change in it: rank=32,alpha=32,layers=mlp+q_proj")
    parser.add_argument("--task", default="numbers", choices=sorted(path.stem for path in TASKS.glob("*.jsonl")))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--part", choices=("search", "report"), help="ask these held-out cases only")
    parser.add_argument("--trl-python", default=".bench/trl/bin/python", help="the Python that has TRL")
    parser.add_argument("--list", action="store_true", help="print the recipes")
    given = parser.parse_args()
    if given.list:
        for name, trial in RECIPES.items():
            print(name, trial)
        return
    task, base, seeds = Task.load(given.task, given.part), load_base(), range(given.seeds)
    if given.recipe.startswith("trl"):
        settings = API_SETTINGS if given.recipe == "trl-api" else {}
        results = try_trl(base, task, seeds, given.trl_python, settings)
    else:
        recipe = None if given.recipe == "product" else changed(RECIPES[given.recipe], given.set)
        results = [try_recipe(base, task, recipe, seed) for seed in seeds]
    print(report(" ".join(filter(None, (given.recipe, given.set))), task, results))


if __name__ == "__main__":
    main()
