"""Without the compiled passes nothing is lost, and the reason is given."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import artemis_kernels
from artemis_kernels import FrozenAdapter, FrozenLinear, QuantizedWeight
from artemis_kernels.core import frozen, native, packed_passes
from artemis_kernels.core.native import Native

COMPILER = native.shutil.which("gcc") or native.shutil.which("cc")
needs_compiler = pytest.mark.skipif(
    native.library().handle is None or COMPILER is None, reason="needs a C compiler that serves"
)


@pytest.fixture(autouse=True)
def fresh_library():
    """`library()` decides anew within each test, and again after it."""
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def test_missing_compiler(monkeypatch):
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    reason = "no C compiler (gcc, cc, clang) is on the PATH"
    with pytest.warns(RuntimeWarning, match=re.escape(reason)):
        assert native.library() == Native(None, reason)
    assert_dropout_works()


def test_failing_compiler(monkeypatch, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'cc: this one never works' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(native.shutil, "which", lambda name: str(compiler))
    handle, reason = library_that_fails()
    assert handle is None and str(compiler) in reason
    assert_dropout_works()


def test_compiler_that_complains_about_nothing(monkeypatch, tmp_path):
    """Exit status 1 and not a word."""
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ]\n')
    compiler.chmod(0o755)
    monkeypatch.setattr(native.shutil, "which", lambda name: str(compiler))
    monkeypatch.setattr(native.Path, "home", lambda: tmp_path)
    handle, reason = library_that_fails()
    assert handle is None and reason == f"{compiler} failed: it did not say why"
    assert_dropout_works()


@needs_compiler
def test_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / ".cache").write_text("a file where a folder should be")
    monkeypatch.setattr(native.Path, "home", lambda: tmp_path)
    handle, reason = native.library()
    folder = tmp_path / ".cache" / "artemis_kernels"
    assert handle is not None
    assert reason.endswith(f" for this process alone: {folder} cannot be written (Not a directory)")
    assert_dropout_works()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lack_of_passes_is_told_once_and_explained(dtype, monkeypatch, tmp_path):
    (tmp_path / ".cache").write_text("a file where a folder should be")
    monkeypatch.setattr(native.Path, "home", lambda: tmp_path)
    monkeypatch.setattr(native.shutil, "which", lambda name: sys.executable)
    x = torch.ones(4, 6, dtype=dtype)
    with pytest.warns(RuntimeWarning, match="slower than by compiled passes") as told:
        lora = artemis_kernels.explain("lora_linear", x, x, x, x[:, :4], 1.0)
        loss = artemis_kernels.explain("cross_entropy", logits=x, target=torch.ones(4).long())
        gate = artemis_kernels.explain("gated_activation", gate=x, up=x)
        heads = x.expand(1, 2, 4, 6)
        turn = artemis_kernels.explain(
            "rotary_embedding", q=heads, k=heads, cos=x[None], sin=x[None]
        )
        assert_dropout_works()
    assert len(told) == 1
    why = f"; no compiled passes: {native.library().reason}"
    assert all(choice.reason.endswith(why) for choice in (lora, loss, gate, turn))


def test_nobody_misses_passes_that_were_never_written(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: Native(None, "switched off"))
    for impl, dtype in (("eager", torch.float64), ("reference", torch.float32)):
        x = torch.ones(4, 6, dtype=dtype)
        choice = artemis_kernels.explain("lora_linear", x, x, x, x[:, :4], 1.0, impl=impl)
        assert choice.reason == "it was asked for"


@pytest.fixture
def home(monkeypatch, tmp_path) -> Path:
    """An empty one; a folder of it is on the PATH before all others."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(native.Path, "home", lambda: tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def compiler_at(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def library_that_fails() -> Native:
    with pytest.warns(RuntimeWarning):
        return native.library()


def kept_in(home: Path) -> list[Path]:
    return list((home / ".cache" / "artemis_kernels").iterdir())


@needs_compiler
def test_the_next_compiler_where_one_makes_what_does_not_load(home):
    """As clang, whose OpenMP wants another runtime than the one that torch brings."""
    compiler_at(home / "bin" / "gcc", f'{COMPILER} -U_FORTIFY_SOURCE -Dmemset=no_such_symbol "$@"')
    works = compiler_at(home / "bin" / "cc", f'exec {COMPILER} "$@"')
    handle, reason = native.library()
    assert handle is not None and reason == f"compiled by {works}"
    assert len(kept_in(home)) == 1
    assert_dropout_works()


def test_the_last_compilers_reason(home, monkeypatch):
    paths = {
        name: compiler_at(home / "bin" / name, f"echo {name} is broken >&2\nexit 1")
        for name in ("gcc", "cc", "clang")
    }
    assert library_that_fails() == Native(None, f"{paths['clang']} failed: clang is broken")


def test_one_compiler_of_two_names_is_asked_once(home, monkeypatch):
    path = compiler_at(home / "bin" / "gcc", "exit 1")
    for name in ("cc", "clang"):
        (home / "bin" / name).symlink_to(path)
    assert list(native._compilers()) == [path]


@needs_compiler
def test_a_damaged_library_is_made_again(home, monkeypatch):
    """It is on the disk before it has its name; a whole one serves as it is."""
    done, replace, fsync = [], os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (done.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("replace"), replace(*paths)))
    target = home / ".cache/artemis_kernels" / f"native-{native._fingerprint(COMPILER)}.so"
    target.parent.mkdir(parents=True)
    target.write_bytes(Path(sys.executable).read_bytes()[:100])
    for _ in range(2):
        native.library.cache_clear()
        assert native.library().handle is not None
        assert done == ["fsync", "replace"] and kept_in(home) == [target]


SOURCES = native._FOLDER
#: What the machine code depends on: changed, the library of another state is none of this one.
DEPENDS_ON = {
    "a source": lambda patch, home: spoil(home, "dropped.c"),
    "a header": lambda patch, home: spoil(home, "vectors.h"),
    "the compiler's flags": lambda patch, home: patch.setattr(native, "_FLAGS", ("-O3",)),
    "the compiler": lambda patch, home: compiler_at(home / "bin" / "gcc", "echo gcc 14"),
    "the processor's flags": lambda patch, home: flags(patch, "avx2", "bmi2"),
    "the processor": lambda patch, home: patch.setattr(
        torch.backends.cpu, "get_cpu_capability", lambda: "another"
    ),
}


def spoil(home: Path, source: str) -> None:
    with (home / "sources" / source).open("a") as file:
        file.write("\n")


def flags(patch, *names: str) -> None:
    patch.setattr(native, "processor_flags", lambda: names)


@pytest.mark.parametrize("what", DEPENDS_ON)
def test_a_library_is_kept_under_the_name_of_all_it_depends_on(what, home, monkeypatch):
    monkeypatch.setattr(native, "_FOLDER", shutil.copytree(SOURCES, home / "sources"))
    flags(monkeypatch, "avx2", "fma")
    compiler = compiler_at(home / "bin" / "gcc", "echo gcc 13")
    name = native._fingerprint(compiler)
    flags(monkeypatch, "fma", "avx2")  # a set's order is another in each process
    assert native._fingerprint(compiler) == name
    DEPENDS_ON[what](monkeypatch, home)
    assert native._fingerprint(compiler) != name


def nowhere() -> Path:
    raise RuntimeError("Could not determine home directory.")


@needs_compiler
def test_without_a_home_it_serves_this_process(monkeypatch):
    monkeypatch.setattr(native.Path, "home", nowhere)
    handle, reason = native.library()
    assert handle is not None and "for this process alone: the user has no home folder" in reason
    assert_dropout_works()


WITHOUT_A_HOME = """
from pathlib import Path
import torch

def nowhere():
    raise RuntimeError("Could not determine home directory.")

Path.home = nowhere
import artemis_kernels
from artemis_kernels import tune

try:
    tune([(8, 8, 2)], [1], device="cpu", progress=False)
except ValueError as error:
    assert "no home folder for the user's table" in str(error), error
else:
    raise AssertionError("nothing was said")
x = torch.randn(2, 8)
choice = artemis_kernels.explain("lora_linear", x, x, x, x[:, :2], 1.0)
"""


def test_imported_without_a_home():
    subprocess.run([sys.executable, "-c", WITHOUT_A_HOME], check=True)


@needs_compiler
def test_a_compiler_that_does_not_know_bf16(home, monkeypatch):
    """Then the passes over few rows of bf16 would be slow ones, and are not there."""
    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, "-mno-avx512bf16"))
    handle = native.library().handle
    if handle is None:
        pytest.skip("the compiler has no such option")
    x, w = torch.randn(3, 64).bfloat16(), torch.randn(40, 64)
    weight = QuantizedWeight.quantize(w, activation_bits=16)
    for passes in ("attention", "bf16_rows", "bf16_product", "thin_product"):
        assert not native.has(handle, passes)
    assert not frozen.most_few_rows(x.dtype, x.device, weight)
    assert not packed_passes.takes_bf16_rows(x, weight)
    y = FrozenLinear(weight, FrozenAdapter.none(weight, dtype=x.dtype))(x)
    truth = x.double() @ weight.dequantize(torch.float64).t()
    for found in (y, packed_passes.few_rows(x, weight)):
        assert (found - truth).norm() < 0.005 * truth.norm()


def assert_dropout_works() -> None:
    x, eye = torch.ones(4, 6), torch.eye(6)
    y = artemis_kernels.lora_linear(x, torch.zeros(6, 6), eye, eye, 1.0, dropout_p=0.5, seed=2)
    assert torch.equal(y != 0, artemis_kernels.dropout_mask((4, 6), 0.5, 2, "cpu"))
