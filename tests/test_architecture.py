"""The shape of the house: imports run one way, and the packages load with little."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path for package in ("artemis_kernels", "artemis") for path in (ROOT / package).rglob("*.py")
)
LAYERS = ("artemis_kernels.core", "artemis_kernels.ops", "artemis_kernels", "artemis")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> list[tuple[str, str]]:
    """`(module, name)` of everything a file imports, relative imports resolved; name may be ''."""
    found = []
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [(module, alias.name) for alias in node.names]
    return found


def layer(module: str) -> int | None:
    """Index in LAYERS of the innermost layer that holds `module`; None outside the project."""
    for index, name in enumerate(LAYERS):
        if module == name or module.startswith(name + "."):
            return index
    return None


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    """core <- ops <- artemis_kernels <- artemis; nobody imports tests or bench."""
    own = layer(module_name(path))
    for module, name in imports(path):
        assert module.split(".")[0] not in ("tests", "bench"), f"{path} imports {module}"
        reached = max(
            (level for level in (layer(module), layer(f"{module}.{name}")) if level is not None),
            key=lambda level: -level,
            default=None,
        )
        assert reached is None or reached <= own, f"{path} imports {module}.{name}"


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("artemis_kernels/ops/*/reference.py")), ids=lambda p: p.parent.name
)
def test_references_import_torch_only(path):
    """And one another: the meaning must not lean on what it judges."""
    for module, _ in imports(path):
        assert module.split(".")[0] == "torch" or module.endswith(".reference"), module


def test_tests_borrow_from_no_test():
    """What several of them use lies in modules without tests."""
    borrowed = [
        (str(path.relative_to(ROOT)), f"{module}.{name}")
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for module, name in imports(path)
        if ".test_" in f"{module}.{name}"
    ]
    assert not borrowed


def test_the_model_layer_uses_public_names_of_the_kernels():
    import artemis_kernels
    import artemis_kernels.nn

    public = {
        "artemis_kernels": {*artemis_kernels.__all__, "nn"},
        "artemis_kernels.nn": set(artemis_kernels.nn.__all__),
    }
    for path in SOURCES:
        if layer(module_name(path)) != LAYERS.index("artemis"):
            continue
        for module, name in imports(path):
            if module.split(".")[0] == "artemis_kernels":
                assert module in public and name in public[module] | {""}, (path, module, name)


def test_only_one_file_asks_the_device():
    for path in SOURCES:
        if path.parts[-2:] == ("core", "device.py") or "artemis_kernels" not in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            asks = isinstance(node, ast.Attribute) and node.attr in (
                "is_available", "get_device_properties", "get_device_capability", "find_spec"
            )  # fmt: skip
            assert not asks, f"{path}:{node.lineno}"


def test_no_environment_variables_of_our_own():
    for path in SOURCES:
        text = path.read_text()
        assert "environ" not in text and "getenv" not in text, path


def test_public_names_are_documented():
    """Every exported function and class says what it is."""
    import artemis
    import artemis_kernels
    import artemis_kernels.nn

    for module in (artemis, artemis_kernels, artemis_kernels.nn):
        assert sorted(module.__all__) == list(module.__all__), module.__name__
        for name in module.__all__:
            value = getattr(module, name)
            assert not callable(value) or value.__doc__, f"{module.__name__}.{name}"


def test_public_operations_and_modules_are_in_the_documents():
    """docs/ names every public function and class at least once."""
    import artemis
    import artemis_kernels
    import artemis_kernels.nn

    text = "\n".join(path.read_text() for path in (ROOT / "docs").rglob("*.md"))
    for module in (artemis, artemis_kernels, artemis_kernels.nn):
        missing = [n for n in module.__all__ if n != "__version__" and n not in text]
        assert not missing, f"{module.__name__}: {missing}"


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it raises, as where it is not installed
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find(name, *a)
import torch, artemis_kernels, artemis_kernels.nn
x, a, b = torch.randn(3, 4), torch.randn(2, 4), torch.randn(5, 2)
y = artemis_kernels.lora_linear(x, torch.randn(5, 4), a, b, 1.0)
try:
    artemis_kernels.lora_linear(x, torch.randn(5, 4), a, b, 1.0, impl="triton")
except artemis_kernels.Unavailable as refusal:
    print(refusal)
"""


def run_alone(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return result.stdout


def test_works_without_triton():
    assert "triton is not installed" in run_alone(WITHOUT_TRITON)


def test_importing_the_kernels_is_lean():
    """Neither triton nor anything beyond torch comes with it, and no GPU is touched."""
    loaded = run_alone(
        "import torch, sys; before = set(sys.modules); import artemis_kernels, artemis_kernels.nn;"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before});"
        "assert not torch.cuda.is_initialized()"
    ).split()
    heavy = {"triton", "transformers", "peft", "accelerate", "numpy", "yaml", "safetensors"}
    assert not heavy & set(loaded), loaded
