"""What engines do, for Prometheus."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class EngineMetrics:
    """Counts and durations, by base model.

    Args:
        registry: Where they are registered; one of their own if not given.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        own: dict[str, Any] = {
            "registry": CollectorRegistry() if registry is None else registry,
            "labelnames": ["model"],
        }
        self.waiting = Gauge(
            "tunesmith_waiting_answers", "Answers and embeddings that wait for their turn.", **own
        )
        self.under_way = Gauge("tunesmith_running_answers", "Answers that are computed together.", **own)
        self.refused = Counter(
            "tunesmith_refused_answers",
            "Answers that were refused or given up instead of computed: queue_full, too_long, overdue, gone.",
            **own | {"labelnames": ["model", "reason"]},
        )
        self.wait = Histogram(
            "tunesmith_wait_seconds", "Seconds that answers waited for their turn.", buckets=SECONDS, **own
        )
        self.first_token = Histogram(
            "tunesmith_first_token_seconds",
            "Seconds from the request to the answer's first token.",
            buckets=SECONDS,
            **own,
        )
        self.prompt_tokens = Counter("tunesmith_prompt_tokens", "Tokens of prompts that were answered.", **own)
        self.recalled_tokens = Counter(
            "tunesmith_recalled_prompt_tokens",
            "Tokens of prompts whose keys and values were known from earlier requests.",
            **own,
        )
        self.guesses = Counter(
            "tunesmith_guessed_tokens",
            "Tokens that were guessed and compared with what the model chose: right, wrong.",
            **own | {"labelnames": ["model", "result"]},
        )
        self.output_tokens = Counter(
            "tunesmith_output_tokens", "Tokens that were computed for answers, ends counted.", **own
        )
        self.batch = Histogram(
            "tunesmith_batch_size",
            "Answers that got a token in one step.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            **own,
        )
        self.blocks = Gauge("tunesmith_kv_blocks", "Blocks that there are for keys and values.", **own)
        self.blocks_in_use = Gauge("tunesmith_kv_blocks_in_use", "Blocks that hold keys and values.", **own)
        self.adapter_hits = Counter("tunesmith_adapter_hits", "Answers whose adapter was in memory.", **own)
        self.adapter_loads = Counter("tunesmith_adapter_loads", "Adapters that were loaded.", **own)
        self.adapter_load_seconds = Histogram(
            "tunesmith_adapter_load_seconds", "Seconds that loading an adapter took.", buckets=SECONDS, **own
        )
        self.adapter_evictions = Counter(
            "tunesmith_adapter_evictions", "Adapters that made room for others.", **own
        )
        self.adapters = Gauge("tunesmith_adapters", "Adapters in memory.", **own)
