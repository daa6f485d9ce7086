"""Whether a vLLM server has the base weights that are here: both read a text, and find it as likely."""

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from tunesmith.base_models.prompts import FORMATS
from tunesmith.base_models.weights import Weights
from tunesmith.engines.probe import near
from tunesmith.engines.vllm_client import VllmClient

TEXT = "Ada Lovelace was born in London in 1815. The cat is in the hat, and 2 + 2 = 4."


def fits(client: VllmClient, served_name: str, weights: Weights) -> bool:
    """Return whether the server's base model finds a text as likely as our weights do; loads them for that.

    Raises:
        ApiError: The server is not there, or refuses.
    """
    passage = FORMATS[weights.model.untuned_prompt_format].passage
    tokens, start = passage(weights.tokenizer(), TEXT)
    start = max(start, 1)  # nothing is known of the likelihood of what comes first
    return near(client.logprob(served_name, tokens, start), _logprob(weights, tokens, start))


@torch.inference_mode()
def _logprob(weights: Weights, tokens: list[int], start: int) -> float:
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model = AutoModelForCausalLM.from_pretrained(weights.path, dtype=torch.bfloat16)
    scores = model(input_ids=torch.tensor([tokens])).logits[0].float().log_softmax(-1)
    places = torch.arange(start, len(tokens))
    return float(scores[places - 1, torch.tensor(tokens)[places]].mean())
