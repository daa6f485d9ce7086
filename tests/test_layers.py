"""A folder imports only folders printed below it in the layout; siblings in one box do not import each other."""

import ast
from collections.abc import Iterator
from pathlib import Path

import tunesmith

SOURCE = Path(tunesmith.__file__).parent

# The layout's boxes from top to bottom; a module may import any box below its own.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"commands"},
    {"demo", "login", "machine", "certificates"},
    {"app", "client", "terminal", "progress"},
    {"api"},
    {"auth"},
    {"services"},
    {"jobs"},
    {"training"},
    {"safety"},
    {"engines"},
    {"kernels"},
    {"exports"},
    {"base_models"},
    {"store"},
    {"caller"},
    {"errors"},
    {"config"},
    {"protos"},
]
DEPTH = {name: depth for depth, layer in enumerate(LAYERS) for name in layer}
TORCH_FREE = {
    "api",
    "auth",
    "services",
    "safety",
    "store",
    "protos",
    "caller",
    "errors",
    "config",
    "cli",
    "commands",
    "client",
    "app",
}


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(SOURCE.rglob("*.py")):
        relative = path.relative_to(SOURCE)
        box = relative.parts[0].removesuffix(".py")
        if box != "__init__" and "versions" not in relative.parts:
            yield box, path


def imports(path: Path, top_level_only: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text("utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "tunesmith":
                yield from (f"tunesmith.{alias.name}" for alias in node.names)
            else:
                yield node.module


def test_every_module_has_its_place() -> None:
    assert {box for box, _ in modules()} - DEPTH.keys() == set()


def test_imports_point_down() -> None:
    wrong = [
        f"{path.relative_to(SOURCE)} imports tunesmith.{target}"
        for box, path in modules()
        for name in imports(path)
        if name.startswith("tunesmith.")
        for target in [name.split(".")[1]]
        if target != box and DEPTH[target] <= DEPTH[box]
    ]
    assert wrong == []


def test_the_service_knows_no_torch() -> None:
    """What answers requests starts without loading torch; the engine loads it."""
    heavy = {"torch", "transformers"}
    wrong = [
        f"{path.relative_to(SOURCE)} imports {name}"
        for box, path in modules()
        if box in TORCH_FREE
        for name in imports(path, top_level_only=True)
        if name.split(".")[0] in heavy
    ]
    assert wrong == []


def test_only_api_knows_http() -> None:
    wrong = [
        f"{path.relative_to(SOURCE)} imports {name}"
        for box, path in modules()
        # These ask other servers: issuers for their keys, vLLM for answers.
        if box not in {"api", "app", "client"} and path.name not in {"issuer_keys.py", "vllm_client.py"}
        for name in imports(path)
        if name.split(".")[0] in {"starlette", "uvicorn", "httpx2", "grpc"}
    ]
    assert wrong == []
