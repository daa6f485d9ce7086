from pathlib import Path
from typing import Any

import pytest
import torch

from exports import models
from exports.models import Made


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny products are faster alone


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return models.make(tmp_path_factory.mktemp("gemma"), "gemma")


@pytest.fixture(scope="session", params=sorted(models.KINDS))
def made(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return models.make(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "unpacked"
