"""What tests of several operations ask of the interpreter."""

import pytest


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that are launched, in order; not those that end a cut shrink."""
    from triton.runtime.interpreter import InterpretedFunction

    names, run = [], InterpretedFunction.run

    def recorded(self, *arguments, **options):
        names.extend([self.__name__] if self.__name__ != "_finish" else [])
        return run(self, *arguments, **options)

    monkeypatch.setattr(InterpretedFunction, "run", recorded)
    return names
