"""Imports point down the layers, private JAX stays in the backend files, and files stay small."""

import ast
import pathlib
import re
import sys
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("pallas_kernels", "qjax")
MAX_LINES = 600

NUMERICS = {"jax", "numpy", "chex"}
FLAX = NUMERICS | {"flax", "rich"}
# Lowest first: the rank of a layer is its place here. Then what it may import from outside.
LAYERS = {
    "pallas_kernels": {"jax", "numpy"},
    "qjax.core": NUMERICS,
    "qjax.ops": NUMERICS,
    "qjax.nn": FLAX,
    "qjax.swap": FLAX,
    "qjax.linen": FLAX,
    "qjax.nnx": FLAX,
    "qjax.calibration": FLAX,
    "qjax.evaluation": FLAX,
    "qjax.train": FLAX | {"optax"},
    "qjax.optim": NUMERICS | {"optax"},
    "qjax.checkpoint": FLAX | {"orbax"},
    "qjax.sampling": NUMERICS,
    "qjax.generate": FLAX,
    "qjax.models": FLAX,
    "qjax.planning": set(),
    "qjax.hf": FLAX | {"safetensors", "tokenizers", "huggingface_hub", "gguf", "jinja2"},
    "qjax": FLAX,
    # Above the public names, which they use as any user does.
    "qjax.finetune": FLAX | {"optax", "matplotlib"},
    "qjax.demo": FLAX | {"optax", "matplotlib"},
    "qjax.quality": FLAX,
    "qjax.commands": FLAX | {"typer"},
    "qjax.tune": FLAX | {"typer"},
    "qjax.cli": FLAX | {"typer"},
}
RANKS = {layer: rank for rank, layer in enumerate(LAYERS)}
# DESIGN's one exception: `model.save_pretrained` delegates to hf by a local import.
EXCEPTIONS = {("qjax.models", "qjax.hf", "save_pretrained")}
# These alone may use what JAX calls private, and the MLIR bindings of jaxlib.
BACKEND_FILE = re.compile(r"^pallas_kernels/(.*/)?(mosaic|triton)\w*\.py$")


class Import(NamedTuple):
    file: str
    line: int
    module: str  # absolute
    function: str | None  # the innermost function that holds a local import

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def sources() -> list[pathlib.Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def read_imports(path: pathlib.Path, text: str) -> list[Import]:
    """All imports of a file, `from package import submodule` counted as the submodule."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    file, found = path.relative_to(ROOT).as_posix(), []

    def visit(node: ast.AST, function: str | None) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                ours = base.split(".")[0] in PACKAGES
                names.append(full if not ours or is_module(full) else base)
        elif isinstance(node, ast.Attribute) and node.attr == "_src":
            names = ["jax._src"] if ast.unparse(node.value) == "jax" else []
        found.extend(Import(file, getattr(node, "lineno", 0), name, function) for name in names)
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(text), None)
    return found


def layer_of(module: str) -> str:
    """The longest entry of LAYERS that holds the module."""
    parts = module.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((name for name in names if name in LAYERS), "")


def order_violations(layer: str, imports: list[Import]) -> list[str]:
    bad = []
    for item in imports:
        if item.module.split(".")[0] not in PACKAGES:
            continue
        target = layer_of(item.module)
        if RANKS[target] > RANKS[layer] and (layer, target, item.function) not in EXCEPTIONS:
            bad.append(f"{item} ({layer} is below {target})")
    return bad


def outside_violations(layer: str, imports: list[Import]) -> list[str]:
    allowed = LAYERS[layer] | set(PACKAGES) | sys.stdlib_module_names

    def ok(item: Import) -> bool:
        root = item.module.split(".")[0]
        return root in allowed or (root == "jaxlib" and bool(BACKEND_FILE.match(item.file)))

    return [str(item) for item in imports if not ok(item)]


def private_imports(imports: list[Import]) -> list[str]:
    def private(item: Import) -> bool:
        parts = item.module.split(".")
        return parts[0] not in {*PACKAGES, *sys.stdlib_module_names} and any(
            part.startswith("_") and not part.startswith("__") for part in parts
        )

    return [str(i) for i in imports if private(i) and not BACKEND_FILE.match(i.file)]


@pytest.fixture(scope="module")
def imports_by_file() -> dict[pathlib.Path, list[Import]]:
    return {path: read_imports(path, path.read_text()) for path in sources()}


def test_every_file_belongs_to_a_layer():
    homeless = [str(path) for path in sources() if layer_of(module_name(path)) not in LAYERS]
    roots = [
        str(path.relative_to(ROOT))
        for path in sources()
        if layer_of(module_name(path)) == "qjax" and path != ROOT / "qjax/__init__.py"
    ]
    assert homeless + roots == []


def test_imports_point_down(imports_by_file):
    bad = [
        violation
        for path, imports in imports_by_file.items()
        for violation in order_violations(layer_of(module_name(path)), imports)
    ]
    assert bad == []


def test_layers_import_only_their_own_third_parties(imports_by_file):
    bad = [
        violation
        for path, imports in imports_by_file.items()
        for violation in outside_violations(layer_of(module_name(path)), imports)
    ]
    assert bad == []


def test_private_imports_stay_in_kernel_backends(imports_by_file):
    assert [bad for imports in imports_by_file.values() for bad in private_imports(imports)] == []


@pytest.mark.parametrize("folder", [*PACKAGES, "tests", "benchmarks"])
def test_files_stay_small(folder):
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines())
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}


# The checks above pass on an empty tree too, so each is shown to catch what it is for.
@pytest.mark.parametrize(
    "file, text, check",
    [
        ("qjax/core/a.py", "from qjax.ops import matmul", order_violations),
        ("qjax/core/a.py", "import qjax", order_violations),
        ("qjax/core/a.py", "def f():\n    from qjax import hf", order_violations),
        ("qjax/nn/linen/a.py", "from ...swap import policy", order_violations),
        ("qjax/models/a.py", "def load():\n    from qjax.hf import x", order_violations),
        ("qjax/core/a.py", "import flax.linen as nn", outside_violations),
        ("qjax/ops/a.py", "from flax import nnx", outside_violations),
        ("pallas_kernels/a.py", "import optax", outside_violations),
        ("pallas_kernels/a.py", "from jaxlib.mlir import ir", outside_violations),
    ],
)
def test_violations_are_caught(file, text, check):
    path = ROOT / file
    assert len(check(layer_of(module_name(path)), read_imports(path, text))) == 1


def test_pallas_kernels_never_import_qjax():
    found = read_imports(ROOT / "pallas_kernels/a.py", "import qjax.core.qtensor")
    assert len(order_violations("pallas_kernels", found)) == 1


def test_the_one_exception_is_allowed():
    text = "class M:\n    def save_pretrained(self):\n        from qjax.hf import save"
    found = read_imports(ROOT / "qjax/models/base.py", text)
    assert order_violations("qjax.models", found) == []


@pytest.mark.parametrize(
    "file, text, count",
    [
        ("qjax/core/a.py", "from jax._src import core", 1),
        ("qjax/core/a.py", "import jax\nx = jax._src.core", 1),
        ("qjax/core/a.py", "from flax.nnx import _private", 1),
        ("pallas_kernels/matmul/mosaic_gpu.py", "from jax._src import core", 0),
        ("pallas_kernels/matmul/reference.py", "from jax._src import core", 1),
    ],
)
def test_private_imports_are_caught(file, text, count):
    assert len(private_imports(read_imports(ROOT / file, text))) == count
