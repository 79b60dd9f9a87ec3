"""Without the compiled passes nothing is lost, and the reason is given."""

import pytest
import torch

import artemis_kernels
from artemis_kernels.core import native
from artemis_kernels.core.native import Native


@pytest.fixture(autouse=True)
def fresh_library():
    """`library()` decides anew within each test, and again after it."""
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def test_missing_compiler(monkeypatch):
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    assert native.library() == Native(None, "no C compiler (cc, gcc, clang) is on the PATH")
    assert_dropout_works()


def test_failing_compiler(monkeypatch, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'cc: this one never works' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(native.shutil, "which", lambda name: str(compiler))
    handle, reason = native.library()
    assert handle is None and str(compiler) in reason
    assert_dropout_works()


def test_compiler_that_complains_about_nothing(monkeypatch, tmp_path):
    """Exit status 1 and not a word."""
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ]\n')
    compiler.chmod(0o755)
    monkeypatch.setattr(native.shutil, "which", lambda name: str(compiler))
    monkeypatch.setattr(native.Path, "home", lambda: tmp_path)
    handle, reason = native.library()
    assert handle is None and "failed" in reason
    assert_dropout_works()


def test_cache_that_cannot_be_written(monkeypatch, tmp_path):
    if native.shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    (tmp_path / ".cache").write_text("a file where a folder should be")
    monkeypatch.setattr(native.Path, "home", lambda: tmp_path)
    handle, reason = native.library()
    assert handle is None and "could not be kept" in reason
    assert_dropout_works()


def assert_dropout_works() -> None:
    x, eye = torch.ones(4, 6), torch.eye(6)
    y = artemis_kernels.lora_linear(x, torch.zeros(6, 6), eye, eye, 1.0, dropout_p=0.5, seed=2)
    assert torch.equal(y != 0, artemis_kernels.dropout_mask((4, 6), 0.5, 2, "cpu"))
