"""The vocabulary: Google's official messages and services and our own, from the committed descriptor set.

They live in a descriptor pool of our own, so that Google's client libraries, which register the same names
in the default pool, can be imported into the same process. `make protos` makes the set and the type stub.
"""

import re
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files

from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import Descriptor, ServiceDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass, GetMessageClassesForFiles

_DESCRIBES_OTHERS = re.compile(r"^google/api/(?!httpbody)|descriptor\.proto$")


def _load() -> tuple[DescriptorPool, dict[str, typing.Any], dict[str, ServiceDescriptor]]:
    pool = DescriptorPool()
    names: dict[str, typing.Any] = {}
    services: dict[str, ServiceDescriptor] = {}
    packed = _packed()
    for file in packed.file:
        pool.Add(file)
    for file in packed.file:
        if not _DESCRIBES_OTHERS.search(file.name):
            for full_name, kind in GetMessageClassesForFiles([file.name], pool).items():
                names.setdefault(full_name.rpartition(".")[2], kind)
        for service in file.service:
            descriptor = pool.FindServiceByName(f"{file.package}.{service.name}")
            services[descriptor.full_name] = descriptor
    return pool, names, services


def _packed() -> descriptor_pb2.FileDescriptorSet:
    return descriptor_pb2.FileDescriptorSet.FromString(
        files(__package__).joinpath("descriptors.binpb").read_bytes()
    )


POOL, _MESSAGES, _SERVICES = _load()
SERVICES: Mapping[str, ServiceDescriptor] = _SERVICES
"""Every service of the descriptor set, by its full name."""


def message_class(descriptor: Descriptor) -> type[Message]:
    """Return the class of a message descriptor of this pool."""
    return GetMessageClass(descriptor)


def extension(descriptor: typing.Any, name: str) -> typing.Any:
    """Return an option of a descriptor, such as `google.api.http` of a method."""
    options = descriptor.GetOptions()
    # The options were parsed with the default pool's classes; ours knows google.api's extensions.
    own = message_class(POOL.FindMessageTypeByName(options.DESCRIPTOR.full_name))
    return own.FromString(options.SerializeToString()).Extensions[POOL.FindExtensionByName(name)]


def comment(full_name: str) -> str:
    """Return what our own .proto files say of a message, field or method; "" for Google's."""
    return _comments().get(full_name, "")


@cache
def _comments() -> dict[str, str]:
    found = {}
    for file in _packed().file:
        for location in file.source_code_info.location:
            found[_name_at(file, location.path)] = " ".join(location.leading_comments.split())
    return found


def _name_at(file: descriptor_pb2.FileDescriptorProto, path: typing.Iterable[int]) -> str:
    """Return the full name of what lies at a path of field numbers and indices."""
    return ".".join([file.package, *_names_along(file, iter(path))])


def _names_along(message: typing.Any, path: Iterator[int]) -> Iterator[str]:
    for number in path:
        index = next(path, None)
        if index is None:  # a file's syntax, package or options
            return
        message = getattr(message, message.DESCRIPTOR.fields_by_number[number].name)[index]
        yield message.name


def __getattr__(name: str) -> typing.Any:
    try:
        return _MESSAGES[name]
    except KeyError:
        raise AttributeError(f"no message named {name}") from None
