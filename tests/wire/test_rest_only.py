"""A server without gRPC."""

from pathlib import Path

from servers import Server


def listening(pid: int) -> list[int]:
    """The TCP ports that a process listens on."""
    sockets = {str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    rows = [row.split() for row in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    own = [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]
    return [int(address.rpartition(":")[2], 16) for address in own]


def test_grpc_can_be_switched_off(tiny: dict[str, str], data_dir: Path) -> None:
    with Server(data_dir, tiny, "--grpc-port", "-1", "--workers", "0") as server:
        assert server.grpc == "off"
        assert listening(server.process.pid) == [int(server.url.rpartition(":")[2])]
        assert server.call("GET", "models")["models"]
    refused = Server(data_dir, tiny).run("serve", "--grpc-port", "-2", code=1)
    assert "grpc_port" in refused
    assert "-1" in refused
