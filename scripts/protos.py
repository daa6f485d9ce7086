"""Compile Google's official protos and our own into the committed descriptor set, and write its type stub.

The official `.proto` files come from Google's npm package (Apache-2.0); the common ones (google/api, google/rpc,
google/longrunning) from googleapis-common-protos. Two of the files are changed on the way; `shadow` says how.
Comments are kept of our own only, for the documents that describe the API.
"""

import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from google.longrunning import operations_pb2
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
)
from grpc_tools import protoc

NPM_PACKAGE = "@google-ai/generativelanguage@3.7.1"
API = "google/ai/generativelanguage/v1beta"
ALPHA = "google/ai/generativelanguage/v1alpha"
SERVICES = (
    "model_service",
    "permission_service",
    "generative_service",
    "text_service",
    "discuss_service",
    "file_service",
    "cache_service",
    "retriever_service",
    "prediction_service",
)
COMMON = ("google/rpc/status.proto", "google/rpc/error_details.proto", "google/rpc/code.proto")

# Conversations as training data, which v1alpha alone declares: served under every version.
MULTITURN = ("TuningExamples", "TuningPart", "TuningContent", "TuningMultiturnExample")

ROOT = Path(__file__).parent.parent
BUILD = ROOT / ".proto-build"
PACKAGE = ROOT / "src/tunesmith/protos"
OWN = "tuning.proto"

SCALARS = {
    FieldDescriptorProto.TYPE_BOOL: "bool",
    FieldDescriptorProto.TYPE_STRING: "str",
    FieldDescriptorProto.TYPE_BYTES: "bytes",
    FieldDescriptorProto.TYPE_DOUBLE: "float",
    FieldDescriptorProto.TYPE_FLOAT: "float",
    FieldDescriptorProto.TYPE_ENUM: "int",
}


def main() -> int:
    """Fetch, compile, write `descriptors.binpb` and `__init__.pyi`."""
    official = fetch()
    common = Path(operations_pb2.__file__).parent.parent.parent
    changed = shadow(official, common)
    well_known = Path(str(files("grpc_tools"))) / "_proto"
    packed = PACKAGE / "descriptors.binpb"
    arguments = [
        "protoc",
        *(f"-I{path}" for path in (changed, official, common, well_known, PACKAGE)),
        "--include_imports",
        "--include_source_info",
        f"--descriptor_set_out={packed}",
        *(f"{API}/{service}.proto" for service in SERVICES),
        "google/longrunning/operations.proto",
        *COMMON,
        OWN,
    ]
    if protoc.main(arguments) != 0:
        return 1
    descriptors = descriptor_pb2.FileDescriptorSet.FromString(packed.read_bytes())
    for file in descriptors.file:
        keep_comments(file, own=file.name == OWN)
    packed.write_bytes(descriptors.SerializeToString(deterministic=True))
    (PACKAGE / "__init__.pyi").write_text("\n".join(stub(descriptors)) + "\n")
    return 0


def keep_comments(file: FileDescriptorProto, *, own: bool) -> None:
    """Drop what the compiler noted of a file's text, but for the comments of our own."""
    noted = [*file.source_code_info.location]
    file.ClearField("source_code_info")
    for location in noted:
        if own and location.leading_comments:
            file.source_code_info.location.add(path=location.path, leading_comments=location.leading_comments)


def shadow(official: Path, common: Path) -> Path:
    """Return a folder whose files protoc takes instead of the official ones of the same names.

    The official files import google/longrunning/operations.proto, which googleapis-common-protos ships under
    the name operations_proto.proto. And v1beta's TuningExamples becomes v1alpha's, which holds conversations
    too, with the messages that it needs.
    """
    folder = BUILD / "shadow"
    operations, tuned_model = folder / "google/longrunning/operations.proto", folder / API / "tuned_model.proto"
    for path in (operations, tuned_model):
        path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(common / "google/longrunning/operations_proto.proto", operations)
    beta, alpha = (official / version / "tuned_model.proto" for version in (API, ALPHA))
    text = beta.read_text("utf-8")
    wanted = "\n\n".join(message_text(alpha.read_text("utf-8"), name) for name in MULTITURN)
    tuned_model.write_text(text.replace(message_text(text, "TuningExamples"), wanted), "utf-8")
    return folder


def message_text(proto: str, name: str) -> str:
    """Return the text of a top-level message of a .proto file, its comment included."""
    found = re.search(rf"(^//.*\n)*^message {name} {{\n(.*\n)*?^}}$", proto, re.MULTILINE)
    if found is None:
        raise ValueError(f"the .proto file has no message {name}")
    return found[0]


def fetch() -> Path:
    """Return the folder that holds google/ai/generativelanguage, unpacked from the npm package."""
    BUILD.mkdir(exist_ok=True)
    packed = subprocess.run(
        ["npm", "pack", "--silent", NPM_PACKAGE], cwd=BUILD, check=True, capture_output=True, text=True
    )
    with tarfile.open(BUILD / packed.stdout.strip()) as archive:
        archive.extractall(BUILD, filter="data")
    return BUILD / "package/build/protos"


def stub(descriptors: descriptor_pb2.FileDescriptorSet) -> Iterator[str]:
    """Yield the lines of the package's type stub: a class per message, by its short name."""
    yield '"""Generated by scripts/protos.py from descriptors.binpb; do not edit."""'
    yield ""
    yield "from collections.abc import Iterable, Mapping, MutableMapping"
    yield "import typing"
    yield "from typing import ClassVar"
    yield ""
    yield "from google.protobuf.descriptor import Descriptor, ServiceDescriptor"
    yield "from google.protobuf.descriptor_pool import DescriptorPool"
    yield "from google.protobuf.internal.containers import ("
    yield "    RepeatedCompositeFieldContainer,"
    yield "    RepeatedScalarFieldContainer,"
    yield ")"
    yield "from google.protobuf.internal.well_known_types import Any as _Any"
    yield "from google.protobuf.internal.well_known_types import Duration as _Duration"
    yield "from google.protobuf.internal.well_known_types import FieldMask as _FieldMask"
    yield "from google.protobuf.internal.well_known_types import ListValue as _ListValue"
    yield "from google.protobuf.internal.well_known_types import Struct as _Struct"
    yield "from google.protobuf.internal.well_known_types import Timestamp as _Timestamp"
    yield "from google.protobuf.message import Message as _Message"
    yield ""
    yield "POOL: DescriptorPool"
    yield "SERVICES: Mapping[str, ServiceDescriptor]"
    yield "def message_class(descriptor: Descriptor) -> type[_Message]: ..."
    yield "def extension(descriptor: typing.Any, name: str) -> typing.Any: ..."
    yield "def comment(full_name: str) -> str: ..."
    yield ""
    for file in descriptors.file:
        if DESCRIBES_OTHERS.search(file.name):
            continue
        for message in file.message_type:
            yield from message_stub(message, "")
        for enum in file.enum_type:
            yield from enum_stub(enum, "")


# As in the package itself; google.api.HttpBody alone is a message of its own right.
DESCRIBES_OTHERS = re.compile(r"^google/api/(?!httpbody)|descriptor\.proto$")
WELL_KNOWN_BASES = {"Any", "Duration", "FieldMask", "ListValue", "Struct", "Timestamp"}


def message_stub(message: DescriptorProto, indent: str) -> Iterator[str]:
    """Yield one message's class."""
    base = f"_Message, _{message.name}" if message.name in WELL_KNOWN_BASES and not indent else "_Message"
    yield f"{indent}class {message.name}({base}):"
    inner = indent + "    "
    for enum in message.enum_type:
        yield from enum_stub(enum, inner)
    for nested in message.nested_type:
        if not nested.options.map_entry:
            yield from message_stub(nested, inner)
    names = [field.name for field in message.field]
    for field in message.field:
        read, _ = field_types(field, message)
        if field.label == field.LABEL_REPEATED or field.type == field.TYPE_MESSAGE:
            yield f"{inner}@property"
            yield f"{inner}def {field.name}(self) -> {read}: ..."
        else:
            yield f"{inner}{field.name}: {read}"
    arguments = "".join(
        f", {field.name}: {field_types(field, message)[1]} | None = ..." for field in message.field
    )
    if "self" in names:
        raise ValueError(f"{message.name} has a field named self")
    yield f"{inner}def __init__(self{', *' if arguments else ''}{arguments}) -> None: ..."


def field_types(field: FieldDescriptorProto, message: DescriptorProto) -> tuple[str, str]:
    """Return a field's type when read, and as a constructor argument."""
    entry = next(
        (n for n in message.nested_type if n.options.map_entry and field.type_name.endswith("." + n.name)),
        None,
    )
    if entry is not None:
        value = field_types(entry.field[1], entry)[0]
        return f"MutableMapping[str, {value}]", f"Mapping[str, {value}]"
    if field.type in (FieldDescriptorProto.TYPE_MESSAGE, FieldDescriptorProto.TYPE_GROUP):
        kind = local_name(field.type_name)
        if field.label == field.LABEL_REPEATED:
            return f"RepeatedCompositeFieldContainer[{kind}]", f"Iterable[{kind}]"
        return kind, kind
    kind = SCALARS.get(field.type, "int")
    if field.label == field.LABEL_REPEATED:
        return f"RepeatedScalarFieldContainer[{kind}]", f"Iterable[{kind}]"
    return kind, kind


def enum_stub(enum: EnumDescriptorProto, indent: str) -> Iterator[str]:
    """Yield an enum's values as class attributes, as protobuf exposes them."""
    yield f"{indent}class {enum.name}:"
    yield f"{indent}    @classmethod"
    yield f"{indent}    def Name(cls, number: int) -> str: ..."
    yield f"{indent}    @classmethod"
    yield f"{indent}    def Value(cls, name: str) -> int: ..."
    for value in enum.value:
        yield f"{indent}    {value.name}: ClassVar[int]"
    if indent:
        for value in enum.value:
            yield f"{indent}{value.name}: ClassVar[int]"


def local_name(type_name: str) -> str:
    """Return `.google.ai.generativelanguage.v1beta.TunedModel.State` as `TunedModel.State`."""
    parts = type_name.lstrip(".").split(".")
    return ".".join(part for part in parts if part[0].isupper())


if __name__ == "__main__":
    sys.exit(main())
