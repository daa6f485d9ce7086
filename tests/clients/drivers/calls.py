"""What a driver prints: a JSON line a call. It runs in every client's environment: standard library only."""

import json
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STAGE: dict[str, Any] = json.loads(os.environ["STAGE"])
LONGEST_NOTE = 300


class Calls:
    """The calls of one client; each is a block, and a block that raises is a call that failed."""

    @contextmanager
    def works(self, call: str, note: str = "") -> Iterator[None]:
        """A call that must work: what the block asserts is part of it."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 — whatever a client raises is a row
            traceback.print_exc()
            _print(call, False, f"{type(error).__name__}: {error}")
        else:
            _print(call, True, note)

    @contextmanager
    def raises(self, call: str, error: type[Exception], *texts: str, **attributes: Any) -> Iterator[None]:
        """A call whose error the client must recognise: its class, parts of its text, its attributes."""
        try:
            yield
        except error as raised:
            missing = [text for text in texts if text not in str(raised)]
            found = {name: getattr(raised, name, None) for name in attributes}
            told = "; ".join([*(f"{name}={value}" for name, value in attributes.items()), *texts])
            if missing or found != attributes:
                _print(call, False, f"{error.__name__} lacks {missing}, has {found}: {raised}")
            else:
                _print(call, True, f"{error.__name__}: {told}" if told else error.__name__)
        except Exception as raised:  # noqa: BLE001
            traceback.print_exc()
            _print(call, False, f"{type(raised).__name__} in place of {error.__name__}: {raised}")
        else:
            _print(call, False, f"raised nothing in place of {error.__name__}")

    @contextmanager
    def client_refuses(self, call: str, error: type[Exception], text: str) -> Iterator[None]:
        """A call that the client itself does not do, whatever the server is."""
        try:
            yield
        except error as raised:
            fine = text in str(raised)
            _print(call, None if fine else False, f"the client refuses: {text}" if fine else str(raised))
        except Exception as raised:  # noqa: BLE001
            traceback.print_exc()
            _print(call, False, f"{type(raised).__name__} in place of {error.__name__}: {raised}")
        else:
            _print(call, False, "the client does this now: move it among the calls that work")


def _print(call: str, ok: bool | None, note: str) -> None:
    line = {"client": STAGE["client"], "call": call, "ok": ok, "note": note[:LONGEST_NOTE]}
    print(json.dumps(line, ensure_ascii=False), flush=True)
