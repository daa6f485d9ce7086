"""Recipes of tuning to try: what `training.loop.TuningRun` does, with one thing or a few done otherwise.

What is here and not in the product was tried and did not become the default.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from tunesmith import protos
from tunesmith.base_models.prompts import FORMATS, PromptFormat, Special, Turn
from tunesmith.training.batches import Batch, collate, micro_batches
from tunesmith.training.examples import Row
from tunesmith.training.loop import Base, Recipe, TuningRun
from tunesmith.training.loss import CHUNK, OutputHead
from tunesmith.training.network import Network

EVALUATION_TOKENS = 2048
STEP_OF_PLACES = 16
"""Compiled kernels take so many rows at a time."""

_labelled = FORMATS["labelled"]
MORE_FORMATS: Mapping[str, PromptFormat] = {
    "labelled-no-bos": replace(_labelled, start=()),
    "labelled-newline": replace(_labelled, end=Special("\n"), stops=(Special("\n"), Special("<eos>"))),
    "labelled-blank": replace(_labelled, before=("\nInput: ",)),
    "labelled-space": replace(_labelled, after=("\nOutput: ",), answer=""),
    "labelled-same-line": replace(_labelled, after=(" Output:",)),
    "lower": replace(_labelled, before=("input: ",), after=("\noutput:",)),
    "upper": replace(_labelled, before=("INPUT: ",), after=("\nOUTPUT:",)),
    "question": replace(_labelled, before=("Q: ",), after=("\nA:",)),
    "question-answer": replace(_labelled, before=("Question: ",), after=("\nAnswer:",)),
    "arrow": replace(_labelled, before=(), after=(" ->",)),
    "quoted": replace(_labelled, before=('Input: "',), after=('"\nOutput: "',), answer=""),
    "letters": replace(_labelled, before=("x: ",), after=("\ny:",)),
    "headed": replace(_labelled, before=("### Input:\n",), after=("\n\n### Output:\n",), answer=""),
    "example": replace(_labelled, before=("Example:\nInput: ",), after=("\nOutput:",)),
    "pairs": replace(_labelled, before=("Each output follows from its input.\n\nInput: ",)),
    "pattern": replace(_labelled, before=("Inputs and outputs, in the same form:\n\nInput: ",)),
    "tabular": replace(_labelled, before=("Input\tOutput\n",), after=("\t",), answer=""),
    "json": replace(_labelled, before=('{"input": "',), after=('", "output": "',), answer=""),
    "code": replace(_labelled, before=(">>> f('",), after=("')\n'",), answer=""),
    "line": replace(_labelled, before=(), after=("\n",), answer=""),
    "turns": replace(
        _labelled,
        before=(Special("<start_of_turn>"), "user\n"),
        after=(Special("<end_of_turn>"), "\n", Special("<start_of_turn>"), "model\n"),
        answer="",
    ),
}
"""Prompt formats beside the product's."""


@dataclass(frozen=True)
class Trial:
    """A recipe to try.

    Attributes:
        rank, alpha: Of the adapter; what is added is alpha / rank times B A x.
        clip: The gradient's largest norm.
        schedule: linear, cosine, constant, or late (linear over the last 30 %): how the learning rate falls.
        warmup: Over which share of the steps it rises first.
        rate: What the learning rate is multiplied by.
        a_rate, b_rate: What those of A and B are multiplied by (LoRA+: b_rate 4 to 16).
        layers: Words, joined by +, of which the names of the layers that learn have one.
        first, last: Only layers between these shares of the depth learn.
        depth_rate: The learning rate's factor for the first layer, growing to 1 for the last one.
        weight_decay, beta1, beta2, eps: AdamW's.
        optimizer: adam, sign, or muon.
        initial: uniform (PEFT's), orthogonal, top or bottom (singular directions of the base's layer).
        initial_scale: What A is multiplied by at the start.
        average: none, ema:DECAY, or last:SHARE, the mean of the last steps' weights.
        serve: What the trained adapter is multiplied by.
        reduction: token (every token weighs the same) or row (every row does).
        smoothing: Of the labels.
        confident: Tokens that have at least this probability teach nothing; above 1 every token teaches.
        focal: Tokens count with (1 - probability) to this power.
        entropy: The weight of the answers' negative entropy, added to the loss.
        prompt: The weight of the prompts' tokens, learnt as well.
        anchor: The weight of the divergence from the base model, KL(base || tuned), at the prompts' tokens.
        hold: The weight of the relative squared distance from the base model's hidden states, there too; not with
            anchor.
        anchored: At how many of a row's prompt tokens at most, evenly spread; 0: at all.
        form: The prompt format; empty: the base model's.
    """

    rank: int = 16
    alpha: float = 16.0
    clip: float = 1.0
    schedule: str = "linear"
    warmup: float = 0.0
    rate: float = 1.0
    a_rate: float = 1.0
    b_rate: float = 1.0
    layers: str = ""
    first: float = 0.0
    last: float = 1.0
    depth_rate: float = 1.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    optimizer: str = "adam"
    initial: str = "uniform"
    initial_scale: float = 1.0
    average: str = "none"
    serve: float = 1.0
    reduction: str = "token"
    smoothing: float = 0.0
    confident: float = 2.0
    focal: float = 0.0
    entropy: float = 0.0
    prompt: float = 0.0
    anchor: float = 0.0
    hold: float = 0.0
    anchored: int = 0
    form: str = ""


def prompt_format(name: str) -> PromptFormat:
    """Return a format of the product's or of the ones to try."""
    return MORE_FORMATS[name] if name in MORE_FORMATS else FORMATS[name]


def rows_of(tokenizer: Tokenizer, form: PromptFormat, pairs: Sequence[Mapping[str, str]]) -> list[Row]:
    """Return pairs as rows of tokens."""
    return [
        Row(form.prompt(tokenizer, [Turn("user", pair["text_input"])]), form.output(tokenizer, pair["output"]))
        for pair in pairs
    ]


@dataclass
class Plan:
    """What is wanted at the places of a batch.

    Attributes:
        weights: (places,) of their losses, by which the network's own weight is multiplied.
        anchored: (places,) whether the base model's distribution is wanted there, not a token.
        base: (anchored places, width) the base model's hidden states.
    """

    weights: Tensor
    anchored: Tensor
    base: Tensor


class TrialHead:
    """The frozen output head with a recipe's loss.

    Attributes:
        plan: For the next batch.
        seen: The hidden states of the last evaluation.
    """

    def __init__(self, head: OutputHead, trial: Trial) -> None:
        self._head, self._trial = head, trial
        self.plan: Plan | None = None
        self.seen = torch.empty(0)

    def learn(self, hidden: Tensor, words: Tensor, targets: Tensor, learnt: int) -> tuple[float, Tensor]:
        """Return the answers' summed cross-entropy in nats, and the gradient of the recipe's loss."""
        if self.plan is None:
            return self._head.learn(hidden, words, targets, learnt)
        trial, plan, total, gradients = self._trial, self.plan, 0.0, []
        base = torch.zeros_like(hidden)
        base[plan.anchored] = plan.base.to(hidden.dtype)
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            logs = self._head._forward(hidden[part].contiguous()).float().log_softmax(-1)
            losses = -logs[torch.arange(len(logs)), targets[part]]
            total += losses[: max(0, learnt - start)].sum().item()
            change = self._change(logs, targets[part]).mul_(plan.weights[part, None])
            at = plan.anchored[part]
            if trial.anchor and at.any():
                chances = self._head._forward(base[part].contiguous()).float().softmax(-1)
                change[at] = (logs[at].exp_() - chances[at]) * plan.weights[part][at, None]
            if trial.hold:
                change[at] = 0.0
            gradients.append(self._head._backward(change.to(hidden.dtype)).float())
            if trial.hold:
                size = base[part].float().square().sum(-1, keepdim=True).clamp_(min=1e-6)
                apart = (hidden[part] - base[part]).float() / size * plan.weights[part, None]
                gradients[-1][at] = apart[at]
        return total, torch.cat(gradients)

    def evaluate(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the head does."""
        self.seen = hidden
        return self._head.evaluate(hidden, targets)

    def _change(self, logs: Tensor, targets: Tensor) -> Tensor:
        """Return the gradient of the logits where tokens are wanted."""
        trial, rows = self._trial, torch.arange(len(logs))
        chances = logs.exp()
        right = chances[rows, targets]
        weights = (right < trial.confident) * (1 - right) ** trial.focal
        along = (chances * logs).sum(-1, keepdim=True) if trial.entropy else None
        change = chances.clone()
        if trial.smoothing:
            change.sub_(trial.smoothing / change.shape[1])
        change[rows, targets] -= 1 - trial.smoothing
        if along is not None:
            change.add_(chances.mul_(logs - along), alpha=trial.entropy)
        return change.mul_(weights[:, None])


class TrialRun(TuningRun):
    """A tuning run by a recipe to try; at its end the adapter is what is to be served."""

    def __init__(
        self, base: Base, rows: Sequence[Row], given: protos.Hyperparameters, seed: int, trial: Trial
    ) -> None:
        super().__init__(base, rows, given, seed, Recipe(trial.rank, trial.alpha, trial.clip, trial.serve))
        self._trial = trial
        self._initialise()
        self._rates = self._flat(self._rate_of)
        self._first = torch.zeros_like(self.adapter.weights)
        self._second = torch.zeros_like(self.adapter.weights)
        self._mean: Tensor | None = None
        self._averaged = 0
        self._head = TrialHead(self._network._head, trial)  # type: ignore[attr-defined]
        self._network._head = self._head  # type: ignore[attr-defined]
        self._kept = {id(row): self._base_hidden(row) for row in self._rows} if trial.anchor or trial.hold else {}

    def _train(self, batch: Sequence[Row]) -> tuple[float, float]:
        loss = self._learn(batch, self.micro_batch_tokens)
        norm = torch.linalg.vector_norm(self.adapter.gradient)
        self.adapter.gradient.mul_((self.recipe.clip_norm / (norm + 1e-6)).clamp_(max=1.0))
        self._change()
        self._average()
        if self.step + 1 == self.total_steps and self._mean is not None:
            self.adapter.weights.copy_(self._mean)
        self.adapter.refresh()
        return loss, norm.item()

    def _learn(self, batch: Sequence[Row], most_tokens: int) -> float:
        plain = Trial()
        names = ("reduction", "smoothing", "confident", "focal", "entropy", "prompt", "anchor", "hold")
        if all(getattr(self._trial, name) == getattr(plain, name) for name in names):
            return super()._learn(batch, most_tokens)
        self.adapter.gradient.zero_()
        learnt = sum(row.learnt for row in batch)
        by_row = self._trial.reduction == "row"
        shares = [1 / (len(batch) * row.learnt) if by_row else 1 / learnt for row in batch]
        prompts = sum(len(self._places(row)) for row in batch)
        share_of = {id(row): share for row, share in zip(batch, shares, strict=True)}
        total = 0.0
        for rows in micro_batches(batch, most_tokens):
            made, self._head.plan = self._planned(rows, share_of, 1 / max(1, prompts))
            total += self._network.learn(made, 1.0) / learnt
        self._head.plan = None
        return total

    def _places(self, row: Row) -> list[int]:
        """Return which of a row's prompt tokens are learnt or held."""
        trial = self._trial
        places = list(range(len(row.prompt) - 1)) if trial.prompt or trial.anchor or trial.hold else []
        most = self._trial.anchored
        return places if not most or len(places) <= most else places[:: math.ceil(len(places) / most)]

    def _planned(self, rows: Sequence[Row], share_of: Mapping[int, float], of_prompt: float) -> tuple[Batch, Plan]:
        """Return a batch of answers, then prompts to learn, then prompts to hold, then places that fill up."""
        made, starts, start = collate(rows, self._base.device), [], 0
        for row in rows:
            starts.append(start)
            start += len(row)
        prompts = [at + place for row, at in zip(rows, starts, strict=True) for place in self._places(row)]
        places, targets = made.places[: made.learnt].tolist(), made.targets[: made.learnt].tolist()
        weights = [share_of[id(row)] for row in rows for _ in range(row.learnt)]
        kinds = [False] * len(places)
        for weight, kind in ((self._trial.prompt, False), (self._trial.anchor or self._trial.hold, True)):
            if weight:
                places, kinds = places + prompts, kinds + [kind] * len(prompts)
                targets = targets + [int(made.tokens[place + 1]) for place in prompts]
                weights = weights + [weight * of_prompt] * len(prompts)
        fill = -len(places) % STEP_OF_PLACES
        plan = Plan(
            torch.tensor(weights + [0.0] * fill),
            torch.tensor(kinds + [False] * fill),
            torch.cat([self._kept[id(row)] for row in rows]) if self._kept else torch.empty(0, 1),
        )
        places, targets = places + places[:1] * fill, targets + [0] * fill
        return replace(made, places=torch.tensor(places), targets=torch.tensor(targets)), plan

    def _base_hidden(self, row: Row) -> Tensor:
        """Return the base model's hidden states at a row's places: the new adapter changes nothing yet."""
        made = collate([row], self._base.device)
        places = self._places(row)
        padded = torch.tensor(places + [0] * (-len(places) % STEP_OF_PLACES))
        self._network.evaluate(replace(made, places=padded, targets=torch.zeros_like(padded)))
        return self._head.seen[: len(places)].clone()

    def _initialise(self) -> None:
        trial = self._trial
        for path, layer in self.adapter.layers.items():
            size = layer.a.norm()
            if trial.initial == "orthogonal":
                layer.a.copy_(torch.linalg.qr(layer.a.T)[0].T)
            elif trial.initial != "uniform":
                layer.a.copy_(self._directions(path))
            layer.a.mul_(trial.initial_scale * size / layer.a.norm())
        self.adapter.refresh()

    def _directions(self, path: str) -> Tensor:
        """Return singular directions of a layer's weight, (rank, in_features)."""
        tensors = load_file(self._base.weights.path / "model.safetensors")
        weight = tensors[f"{path}.weight"].float()
        vectors = torch.linalg.eigh(weight.T @ weight)[1]  # in ascending order
        rank = self._trial.rank
        chosen: Tensor = vectors[:, -rank:] if self._trial.initial == "top" else vectors[:, :rank]
        return chosen.T

    def _flat(self, value: Callable[[str, str], float]) -> Tensor:
        """Return a flat vector with a value for each layer's A and B."""
        weights = self.adapter.weights.clone()
        for path, layer in self.adapter.layers.items():
            layer.a.fill_(value(path, "a"))
            layer.b.fill_(value(path, "b"))
        made = self.adapter.weights.clone()
        self.adapter.weights.copy_(weights)
        return made

    def _rate_of(self, path: str, side: str) -> float:
        trial = self._trial
        numbers = [int(word) for name in self.adapter.layers for word in name.split(".") if word.isdigit()]
        depth = next(int(word) for word in path.split(".") if word.isdigit()) / max(numbers)
        if trial.layers and not any(word in path for word in trial.layers.split("+")):
            return 0.0
        if not trial.first <= depth <= trial.last:
            return 0.0
        rate = trial.a_rate if side == "a" else trial.b_rate
        return rate * trial.rate * (trial.depth_rate + (1 - trial.depth_rate) * depth)

    def _factor(self) -> float:
        """Return the share of the learning rate at this step."""
        trial, done = self._trial, self.step / self.total_steps
        if done < trial.warmup:
            return (self.step + 1) / (math.ceil(trial.warmup * self.total_steps) + 1)
        left = 1 - (done - trial.warmup) / (1 - trial.warmup)
        return {
            "linear": left,
            "cosine": 0.5 - 0.5 * math.cos(math.pi * left),
            "constant": 1.0,
            "late": min(1.0, left / 0.3),
        }[trial.schedule]

    def _change(self) -> None:
        """Change the weights: AdamW, its sign, or Muon (orthogonalised momentum)."""
        trial, number = self._trial, self.step + 1
        rate = self._given.learning_rate * self._factor()
        weights, gradient = self.adapter.weights, self.adapter.gradient
        if trial.weight_decay:
            weights.mul_(1 - rate * trial.weight_decay)
        self._first.lerp_(gradient, 1 - trial.beta1)
        self._second.mul_(trial.beta2).addcmul_(gradient, gradient, value=1 - trial.beta2)
        if trial.optimizer == "adam":
            change = (self._second / (1 - trial.beta2**number)).sqrt_().add_(trial.eps)
            change = torch.div(self._first, change, out=change).mul_(1 / (1 - trial.beta1**number))
        elif trial.optimizer == "sign":
            change = self._first.sign()
        else:
            change = self._orthogonal(self._first)
        weights.addcmul_(change, self._rates, value=-rate)

    def _orthogonal(self, flat: Tensor) -> Tensor:
        """Return each matrix's nearest orthogonal one, half as large as Adam's first change is."""
        weights = self.adapter.weights.clone()
        self.adapter.weights.copy_(flat)
        for layer in self.adapter.layers.values():
            for part in (layer.a, layer.b):
                wide = part if part.shape[0] < part.shape[1] else part.T
                values, vectors = torch.linalg.eigh(wide @ wide.T)
                inverse = (vectors * values.clamp(min=1e-20).rsqrt()) @ vectors.T
                nearest = inverse @ wide * (0.5 * math.sqrt(wide.shape[1]))
                part.copy_(nearest if wide is part else nearest.T)
        made = self.adapter.weights.clone()
        self.adapter.weights.copy_(weights)
        return made

    def _average(self) -> None:
        kind, _, value = self._trial.average.partition(":")
        weights, done = self.adapter.weights, (self.step + 1) / self.total_steps
        if kind == "ema":
            # A short memory at first, so that the start is forgotten.
            self._averaged += 1
            keep = min(float(value), self._averaged / (self._averaged + 9))
            self._mean = weights.clone() if self._mean is None else self._mean.lerp_(weights, 1 - keep)
        elif kind == "last" and done > 1 - float(value):
            self._averaged += 1
            self._mean = weights.clone() if self._mean is None else self._mean.lerp_(weights, 1 / self._averaged)


def answers(network: Network, cases: Iterable[Row], device: torch.device) -> list[bool]:
    """Return for each case whether the whole answer is what greedy generation gives."""
    right: dict[int, bool] = {}
    cases = list(cases)
    for part in micro_batches(cases, EVALUATION_TOKENS):
        hits = network.evaluate(collate(part, device))[1]
        for row, of_row in zip(part, torch.split(hits, [row.learnt for row in part]), strict=True):
            right[id(row)] = bool(of_row.all())
    return [right[id(row)] for row in cases]


def take_over(network: Network, folder: Path) -> None:
    """Put an adapter that PEFT saved, of the network's rank and scale, into the network's."""
    network.adapter.weights.zero_()
    tensors: dict[str, Any] = load_file(folder / "adapter_model.safetensors")
    for path, layer in network.adapter.layers.items():
        for side, part in (("A", layer.a), ("B", layer.b)):
            found = tensors.pop(f"base_model.model.{path}.lora_{side}.weight", None)
            if found is not None:
                part.copy_(found)
    if tensors:
        raise SystemExit(f"{folder} adapts layers that are not known here: {min(tensors)}")
    network.adapter.refresh()


def shape_of(folder: Path) -> tuple[int, float]:
    """Return the rank and alpha of an adapter that PEFT saved."""
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    return config["r"], config["lora_alpha"]
