"""Tunesmith's server with vLLM as its engine: tune, and ask the tuned model."""

import os
from pathlib import Path

from engines.vllm_model import vllm_weights
from servers import Server, job


def test_a_tuned_model_answers(tmp_path: Path) -> None:
    model, weights = vllm_weights(tmp_path / "cache")
    fields = model.model_dump(mode="json", exclude={"id"}, exclude_none=True)
    block = "\n".join(f"{key} = {value!r}" for key, value in fields.items())
    catalog = tmp_path / "catalog.toml"
    catalog.write_text(f'default = "{model.id}"\n[models.{model.id}]\n{block}\n')
    environment = {
        "TUNESMITH_CATALOG": str(catalog),
        "TUNESMITH_CACHE_DIR": str(tmp_path / "cache"),
        "TUNESMITH_ENGINE": "vllm",
        "TUNESMITH_VLLM_URL": os.environ["TUNESMITH_TEST_VLLM"],
        "OMP_NUM_THREADS": "1",
    }
    with Server(tmp_path / "data", environment) as server:
        operation = server.finished(server.tune(job(base_model=f"models/{model.id}")))
        body = {"contents": [{"parts": [{"text": "3"}]}]}
        answer = server.call("POST", f"{operation['metadata']['tunedModel']}:generateContent", body)
        assert answer["modelVersion"] == weights.version
        assert answer["candidates"][0]["finishReason"] in ("STOP", "MAX_TOKENS")
        assert answer["usageMetadata"]["promptTokenCount"] > 3
        said = server.run("doctor")
        assert "the same as here" in said
