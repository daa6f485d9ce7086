"""Tests on a real vLLM server, outside the ordinary suite: `make test-vllm` runs them."""

import os

collect_ignore_glob = [] if os.environ.get("TUNESMITH_TEST_VLLM") else ["test_*"]
