"""Tiny models to train."""

from collections.abc import Iterator

import pytest
import torch

from tiny import tiny_cache
from tunesmith.base_models import weights
from tunesmith.training import loop
from tunesmith.training.loop import Base


@pytest.fixture(scope="module", params=["gemma3", "llama"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Base]:
    model, cache = tiny_cache(tmp_path_factory.mktemp("cache"), request.param)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for models this small, threads that wait for each other take most of the time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "compute_dtype", lambda _device: torch.float32)
        yield Base.load(weights.get(model, cache), torch.device("cpu"))
    torch.set_num_threads(threads)
