"""google.api.HttpBody: a stream whose messages are the parts of a file."""

import re
from urllib.parse import quote

from google.protobuf.descriptor import Descriptor

from tunesmith import protos
from tunesmith.api.exchange import Headers

_UNKNOWN = "application/octet-stream"
_PLAIN = re.compile(r"[^A-Za-z0-9._ -]")


def is_download(kind: Descriptor) -> bool:
    """Return whether responses of a kind are sent as the bytes that they hold."""
    return kind.full_name == "google.api.HttpBody"


def headers_of(body: protos.HttpBody) -> Headers:
    """Return what HTTP says of a download, from its first part."""
    headers = [(b"content-type", (body.content_type or _UNKNOWN).encode())]
    about = protos.Download()
    if any(extension.Unpack(about) for extension in body.extensions):
        if about.filename:
            headers.append((b"content-disposition", _disposition(about.filename)))
        if about.size:
            headers.append((b"content-length", str(about.size).encode()))
    return headers


def _disposition(filename: str) -> bytes:
    """Return the header's value as RFC 6266 has it, with a plain name for those that know no other."""
    plain = _PLAIN.sub("_", filename)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}".encode()
