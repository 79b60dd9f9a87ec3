"""Saving that is cut short: the old adapter or the new one is there, whole."""

import copy
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from artemis import load_hybrid_adapter
from artemis.atomic import replace_files
from tests.artemis.models import adapted, fill_bank, llama, snapshot

FILE = "hybrid_adapter.safetensors"


class Killed(BaseException):
    """Stands for the end of the process: nothing of ours may run after it."""


@pytest.mark.parametrize("first", [True, False], ids=["first-save", "over-an-old-one"])
def test_dying_at_any_step_leaves_the_old_adapter_or_the_new_one(first, tmp_path, monkeypatch):
    base = llama()
    model = adapted(copy.deepcopy(base))
    old = snapshot(model)
    step, finished = 0, False
    while not finished:
        path = tmp_path / str(step)
        model.load_state_dict(old)
        if not first:
            model.save_adapter_parameters(path)
        fill_bank(model)
        new, left = snapshot(model), step

        def dying(function, writes_to=None):
            def run(*args, **kwargs):
                nonlocal left
                if left == 0:
                    if writes_to is not None:  # dies half way through
                        args[writes_to].write_bytes(b"half")
                    raise Killed
                left -= 1
                return function(*args, **kwargs)

            return run

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", dying(os.fsync))
            patch.setattr(os, "replace", dying(os.replace))
            patch.setattr("artemis.adapter_file.save_file", dying(save_file, writes_to=1))
            patch.setattr(Path, "write_text", dying(Path.write_text, writes_to=0))
            patch.setattr(Path, "unlink", lambda *args, **kwargs: None)
            try:
                model.save_adapter_parameters(path)
                finished = True
            except Killed:
                pass
        if first and not (path / FILE).exists():
            assert not finished
        else:
            loaded = load_hybrid_adapter(copy.deepcopy(base), path)
            state = snapshot(loaded)
            same = [all(torch.equal(state[k], v) for k, v in s.items()) for s in (old, new)]
            assert any(same[1:] if first or finished else same), f"step {step}"
        step += 1
    assert step > 6  # two writes, two syncs, two moves and the directory's sync were interrupted


def test_what_is_synced_was_opened_for_writing(tmp_path, monkeypatch):
    """As Windows wants it; a directory can be opened for reading only."""
    modes, opened = [], os.open

    def recording(path, mode, *args, **kwargs):
        modes.append((Path(path) == tmp_path, mode))
        return opened(path, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", recording)
        replace_files(tmp_path, {"file": lambda path: path.write_text("text")})
    assert modes == [(False, os.O_RDWR), (True, os.O_RDONLY)]


def test_without_directories_to_open_files_are_replaced_all_the_same(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_DIRECTORY")
    replace_files(tmp_path, {"file": lambda path: path.write_text("text")})
    assert (tmp_path / "file").read_text() == "text"


SAVING = textwrap.dedent("""
    import sys, torch
    from tests.artemis.models import adapted, llama
    torch.manual_seed(1)
    model = adapted(llama())
    model.save_adapter_parameters(sys.argv[1])
    print("ready", flush=True)
    value = 0
    while True:
        value += 1
        with torch.no_grad():
            for parameter in model.hybrid_adapter.parameters():
                parameter.fill_(value)
        model.save_adapter_parameters(sys.argv[1])
""")


def test_a_killed_process_leaves_a_whole_adapter(tmp_path):
    """SIGKILL at random moments of an endless loop of saves; all tensors are of one save."""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", SAVING, str(tmp_path / str(number))],
            stdout=subprocess.PIPE, cwd=Path(__file__).parents[2],
        )
        for number in range(2)
    ]  # fmt: skip
    for number, child in enumerate(children):
        assert child.stdout.readline() == b"ready\n"
        time.sleep(0.1 + random.random() / 10)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        torch.manual_seed(1)
        model = load_hybrid_adapter(llama(), tmp_path / str(number))
        values = {v for p in model.hybrid_adapter.parameters() for v in p.unique().tolist()}
        assert len(values) == 1
