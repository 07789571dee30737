"""Which part may import which, read from the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ("pallas_kernels", "models", "jaxdual", "server")  # a folder imports only what stands before it, and itself
KERNEL_IMPORTS = {"jax", "numpy", "jaxtyping", "pallas_kernels"}
WITHOUT_JAX = ("jaxdual/kv", "jaxdual/scheduling", "jaxdual/transport", "jaxdual/agent", "jaxdual/cluster")
FACES = ("starlette", "uvicorn", "grpc", "msgspec", "torch", "transformers")


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Names of the imported modules; `from a import b` gives `a` and `a.b`, since `b` may be one."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


@pytest.mark.parametrize("folder", ORDER)
def test_a_folder_imports_only_those_before_it(folder: str) -> None:
    later = {*ORDER[ORDER.index(folder) + 1 :], "bench", "tests"}
    for path in sources(folder):
        assert not tops(path) & later, f"{path.relative_to(ROOT)} imports {tops(path) & later}"


def test_kernels_import_jax_numpy_and_jaxtyping_only() -> None:
    paths = sources("pallas_kernels")
    assert paths
    for path in paths:
        foreign = tops(path) - KERNEL_IMPORTS - set(sys.stdlib_module_names)
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


def module_path(name: str) -> Path | None:
    base = ROOT.joinpath(*name.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def reached(path: Path) -> set[Path]:
    """The module and all of jaxdual that it imports, but for the package's own list of public names."""
    done: set[Path] = set()
    todo = [path]
    while todo:
        current = todo.pop()
        if current in done or current == ROOT / "jaxdual" / "__init__.py":
            continue
        done.add(current)
        for name in imports(current):
            found = module_path(name) if name.startswith("jaxdual") else None
            if found is not None:
                todo.append(found)
    return done


@pytest.mark.parametrize("folder", WITHOUT_JAX)
def test_policies_and_kv_accounting_reach_no_jax(folder: str) -> None:
    for path in sources(folder):
        for module in reached(path):
            heavy = tops(module) & {"jax", "jaxlib", "jaxtyping", "flax", "models", "pallas_kernels"}
            assert not heavy, f"{path.relative_to(ROOT)} reaches {module.relative_to(ROOT)}, which imports {heavy}"


def test_the_reader_of_imports_sees_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "a" / "b" / "c.py"
    file.parent.mkdir(parents=True)
    file.write_text("import x.y\nfrom . import d\nfrom ..e import f\ndef g():\n    from h import i\n")
    assert set(imports(file)) == {"x.y", "a.b", "a.b.d", "a.e", "a.e.f", "h", "h.i"}


def test_importing_jaxdual_loads_no_face_and_starts_no_backend() -> None:
    code = (
        "import sys, jaxdual, jaxdual.engine.engine\n"
        f"print([name for name in {FACES!r} if name in sys.modules])\n"
        "from jax._src import xla_bridge\n"
        "print(xla_bridge.backends_are_initialized())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["[]", "False"]
