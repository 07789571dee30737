"""The committed modules are those of their .proto files."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from server.proto.jaxdual.v1 import inference_pb2
from server.proto.kserve import open_inference_pb2

ROOT = Path(__file__).parents[3]


def described(source):
    """The file descriptor that a generated module holds; what stands around it is up to the compiler's version."""
    (literal,) = [
        call.args[0]
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "AddSerializedFile"
    ]
    return ast.literal_eval(literal)


@pytest.mark.parametrize("module", [inference_pb2, open_inference_pb2])
def test_the_committed_module_is_that_of_its_proto_file(module, tmp_path):
    pytest.importorskip("grpc_tools")
    name = module.DESCRIPTOR.name
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", ".", f"--python_out={tmp_path}", name]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    made = tmp_path / name.replace(".proto", "_pb2.py")
    assert described(made.read_text()) == described(Path(module.__file__).read_text())
