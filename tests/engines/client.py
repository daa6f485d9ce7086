"""Asks an engine, and knows what transformers and PEFT would answer."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
from tunesmith.base_models.catalog import BaseModel
from tunesmith.base_models.prompts import FORMATS, Turn
from tunesmith.base_models.weights import Weights
from tunesmith.engines.base import Chunk, Sampling
from tunesmith.engines.torch_engine import TorchEngine
from tunesmith.errors import ApiError
from tunesmith.store.artifacts import ArtifactStore


@dataclass
class Base:
    """A tiny base model, three adapters of it as PEFT runs them, and a store that holds these."""

    model: BaseModel
    cache: Path
    store: ArtifactStore
    weights: Weights
    reference: Any
    adapted: dict[str, Any]

    def tokens(self, adapter: str | None, text: str, count: int) -> list[int]:
        """What transformers and PEFT answer, greedily."""
        name = self.model.prompt_format if adapter else self.model.untuned_prompt_format
        form, tokenizer = FORMATS[name], self.weights.tokenizer()
        prompt = form.prompt(tokenizer, [Turn("user", text)])
        model = self.adapted[adapter] if adapter else self.reference
        return tiny.greedy(model, prompt, count, form.stop_tokens(tokenizer))

    def text(self, adapter: str | None, text: str, count: int) -> str:
        """The same as text."""
        decoded = self.weights.tokenizer().decode(self.tokens(adapter, text, count))
        opening = FORMATS[self.model.prompt_format].answer if adapter else ""
        return decoded.removeprefix(opening)


class Client:
    """Asks an engine as the service does."""

    def __init__(self, base: Base, **options: Any) -> None:
        self.base = base
        self.engine = TorchEngine(base.store, base.cache, device="cpu", **options)

    @property
    def runner(self) -> Any:
        self.engine.preload(self.base.model)
        return self.engine._runners[self.base.model.id]

    def chunks(
        self,
        adapter: str | None,
        text: str,
        count: int = 24,
        gone: threading.Event | None = None,
        caller: str = "",
        **sampling: Any,
    ) -> Iterator[Chunk]:
        options = {"temperature": 0.0, "top_p": 1.0, "top_k": 0} | sampling
        return self.engine.generate(
            self.base.model,
            adapter,
            [Turn("user", text)],
            Sampling(max_output_tokens=count, **options),
            gone or threading.Event(),
            caller,
        )

    def ask(self, adapter: str | None, text: str, count: int = 24, **sampling: Any) -> str:
        return "".join(chunk.text for chunk in self.chunks(adapter, text, count, **sampling))

    def ask_all(self, questions: list[dict[str, Any]]) -> list[str]:
        """Ask from a thread each, so that all are in one batch."""
        answers: list[Any] = [None] * len(questions)

        def ask(number: int) -> None:
            try:
                answers[number] = self.ask(**questions[number])
            except ApiError as error:
                answers[number] = error

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(questions))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return answers
