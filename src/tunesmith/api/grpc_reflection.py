"""Server reflection: what tools such as grpcurl read the services and messages from."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from tunesmith import protos

# Newer tools ask for v1, older ones for v1alpha; the messages are the same.
_OLD, _NEW = "grpc.reflection.v1alpha", "grpc.reflection.v1"


def reflection_handlers(
    package: str, versions: Iterable[str], threads: ThreadPoolExecutor
) -> Iterator[grpc.GenericRpcHandler]:
    """Yield the handlers of server reflection, which shows every service of this server.

    Args:
        package: The package of Google's services in the descriptors, such as `a.b.v1beta`.
        versions: The packages that it is served under besides its own.
        threads: Runs it; each open stream holds a thread.
    """
    pool, services = DescriptorPool(), set[str]()
    for file in [*_files(protos.SERVICES.values()), *_files([_service(health_pb2), _service(reflection_pb2)])]:
        renames = [(package, other) for other in versions] if file.package == package else []
        if file.package == _OLD:
            renames = [(_OLD, _NEW)]
        for own in [file, *(_renamed(file, old, new) for old, new in renames)]:
            pool.Add(own)
            services.update(f"{own.package}.{service.name}" for service in own.service)
    servicer = reflection.ReflectionServicer(sorted(services), pool=pool)

    def serve(requests: Any, context: grpc.ServicerContext) -> Any:
        return servicer.ServerReflectionInfo(requests, context)

    serve.experimental_thread_pool = threads  # type: ignore[attr-defined]  # grpc's way to choose the threads
    handler = grpc.stream_stream_rpc_method_handler(
        serve,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    for name in (_NEW, _OLD):
        yield grpc.method_handlers_generic_handler(f"{name}.ServerReflection", {"ServerReflectionInfo": handler})


def _service(module: Any) -> Any:
    return next(iter(module.DESCRIPTOR.services_by_name.values()))


def _files(services: Iterable[Any]) -> list[FileDescriptorProto]:
    """Return the files of services and all that they import, each after what it imports."""
    found: dict[str, FileDescriptorProto] = {}

    def add(file: FileDescriptor) -> None:
        if file.name not in found:
            for dependency in file.dependencies:
                add(dependency)
            found[file.name] = FileDescriptorProto()
            file.CopyToProto(found[file.name])

    for service in services:
        add(service.file)
    return list(found.values())


def _renamed(file: FileDescriptorProto, old: str, new: str) -> FileDescriptorProto:
    """Return a copy of a file, as if its package and those of its like had another name."""
    copy = FileDescriptorProto()
    copy.CopyFrom(file)
    folder = file.name.rpartition("/")[0]
    new_folder = f"{folder.rpartition('/')[0]}/{new.rpartition('.')[2]}"
    copy.name, copy.package = new_folder + file.name.removeprefix(folder), new
    for index, dependency in enumerate(copy.dependency):
        if dependency.startswith(folder + "/"):
            copy.dependency[index] = new_folder + dependency.removeprefix(folder)
    for message in copy.message_type:
        _rename_types(message, f".{old}.", f".{new}.")
    for service in copy.service:
        for method in service.method:
            method.input_type = method.input_type.replace(f".{old}.", f".{new}.")
            method.output_type = method.output_type.replace(f".{old}.", f".{new}.")
    return copy


def _rename_types(message: DescriptorProto, old: str, new: str) -> None:
    for field in message.field:
        if field.type_name:  # an assignment would make one
            field.type_name = field.type_name.replace(old, new)
    for nested in message.nested_type:
        _rename_types(nested, old, new)
