"""ExportTunedModel: a tuned model as a file that other programs load, made while it is sent."""

import threading
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith import protos
from tunesmith.base_models import weights
from tunesmith.base_models.catalog import Catalog
from tunesmith.caller import Caller
from tunesmith.errors import Cancelled, FailedPrecondition, InvalidArgument, ResourceExhausted
from tunesmith.services import access, lineage
from tunesmith.store.artifacts import ArtifactStore
from tunesmith.store.audit import Audit
from tunesmith.store.database import Database

if TYPE_CHECKING:
    from tunesmith.exports.formats import Download
    from tunesmith.exports.gguf_file import Quantization
    from tunesmith.exports.tuned import Tuned

DEFAULT_QUANTIZATION = "F16"
RETRY_SECONDS = 10.0
"""When to try again with one export too many: most are sent by then."""


class Exports:
    """Makes exports.

    It takes the role of a writer: a copy of the weights stays when the sharing ends, and may give away what the
    model was tuned on. A reader sees the model and asks it. Each export is recorded.

    Args:
        database: Where the tuned models are.
        artifacts: Where their adapters are.
        catalog: The base models.
        cache_dir: Where the base models' weights are.
        audit: Where exports are recorded.
        most: How many an account may have under way; 0 for any number.
    """

    def __init__(
        self,
        database: Database,
        artifacts: ArtifactStore,
        catalog: Catalog,
        cache_dir: Path,
        audit: Audit,
        most: int = 0,
    ) -> None:
        self._database, self._artifacts, self._catalog = database, artifacts, catalog
        self._cache_dir, self._audit, self._most = cache_dir, audit, most
        self._lock = threading.Lock()
        self._sending: Counter[str] = Counter()

    def export_tuned_model(
        self, request: protos.ExportTunedModelRequest, caller: Caller
    ) -> Generator[protos.HttpBody]:
        """Send a tuned model as a file that other programs load: PEFT, SAFETENSORS, GGUF or OLLAMA.

        The first piece says what the file is called and how long it is.

        Raises:
            InvalidArgument: There is no such format, or it has no such quantization.
            PermissionDenied: The caller is no writer of the model.
            FailedPrecondition: The model is not ACTIVE, or cannot be had in this format; the message says why.
            ResourceExhausted: The account has as many exports under way as it may.
            Cancelled: The caller left.
        """
        kind, quantization = _asked(request)
        with self._one_of_few(caller.account):
            with self._audit.change(caller, "ExportTunedModel", request.name, kind):
                download = self._download(request.name, kind, quantization, caller)
            with closing(_bodies(download)) as bodies:
                for body in bodies:
                    if caller.gone.is_set():
                        raise Cancelled("The client left before the whole file was sent.")
                    yield body

    def _download(self, name: str, kind: str, quantization: "Quantization", caller: Caller) -> "Download":
        from tunesmith.exports.formats import FORMATS  # with what it needs it takes a while to load

        return FORMATS[kind](self._tuned(name, caller), quantization)

    def _tuned(self, name: str, caller: Caller) -> "Tuned":
        from tunesmith.exports.tuned import Tuned

        with self._database.read() as session:
            row = access.tuned_model(session, caller, name, access.WRITER)
            path = lineage.adapter_of(session, row)
            message = protos.TunedModel.FromString(row.message)
            base = self._catalog.get(f"models/{row.base}")
        found, manifest = weights.get(base, self._cache_dir), self._artifacts.manifest(path)
        if manifest["weights_sha256"] != found.sha256:
            raise FailedPrecondition(
                f"Tuned model {name} was tuned on other weights of models/{base.id} (SHA-256 "
                f"{manifest['weights_sha256']}) than those on this machine ({found.sha256}). Tune it again, or "
                "bring back the weights that it was tuned on."
            )
        return Tuned(
            id=row.id,
            display_name=message.display_name,
            made=datetime.fromtimestamp(message.create_time.seconds, UTC),
            base=found,
            adapter=self._artifacts.read(path),
            prompt_format=manifest["prompt_format"],
            temperature=message.temperature,
            top_p=message.top_p,
            top_k=message.top_k,
        )

    @contextmanager
    def _one_of_few(self, account: str) -> Iterator[None]:
        with self._lock:
            room = not self._most or self._sending[account] < self._most
            if room:
                self._sending[account] += 1
        if not room:
            what = "Too many tuned models are being exported."
            raise ResourceExhausted.over("exports_per_account", self._most, account, what, RETRY_SECONDS)
        try:
            yield
        finally:
            with self._lock:
                self._sending[account] -= 1
                if not self._sending[account]:
                    del self._sending[account]


def _asked(request: protos.ExportTunedModelRequest) -> "tuple[str, Quantization]":
    """Return the format and the quantization that are asked for, however they are spelled."""
    from tunesmith.exports.formats import FORMATS, QUANTIZED
    from tunesmith.exports.gguf_file import QUANTIZATIONS

    kind, quantization = request.format.upper(), request.quantization.upper()
    wrong = []
    if kind not in FORMATS:
        wrong.append(("format", f"must be one of {', '.join(FORMATS)}, not {request.format!r}"))
    elif quantization and kind not in QUANTIZED:
        wrong.append(("quantization", f"is for {' and '.join(QUANTIZED)}; {kind} has the weights as they are"))
    if quantization and quantization not in QUANTIZATIONS:
        choices = ", ".join(QUANTIZATIONS)
        wrong.append(("quantization", f"must be one of {choices}, not {request.quantization!r}"))
    if wrong:
        raise InvalidArgument.at([(f"ExportTunedModelRequest.{field}", reason) for field, reason in wrong])
    chosen = next(one for one in QUANTIZATIONS if one == (quantization or DEFAULT_QUANTIZATION))
    return kind, chosen


def _bodies(download: "Download") -> Generator[protos.HttpBody]:
    first = protos.HttpBody(content_type=download.content_type)
    first.extensions.add().Pack(protos.Download(filename=download.filename, size=download.size))
    with closing(download.pieces) as pieces:
        for piece in pieces:
            first.data = piece
            yield first
            first = protos.HttpBody()
