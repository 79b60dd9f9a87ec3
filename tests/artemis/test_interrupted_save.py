"""Saving that is cut short: the old adapter or the new one is there, whole."""

import copy
import fcntl
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from artemis import load_hybrid_adapter
from artemis.saving.atomic import replace_files
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
            patch.setattr("artemis.saving.adapter_file.save_file", dying(save_file, writes_to=1))
            patch.setattr(Path, "write_text", dying(Path.write_text, writes_to=0))
            patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
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
    modes = []

    def recording(descriptor):
        mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        modes.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), mode))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", recording)
        replace_files(tmp_path, {"file": lambda path: path.write_text("text")})
    assert modes == [(False, os.O_RDWR), (True, os.O_RDONLY)]


def test_without_directories_to_open_files_are_replaced_all_the_same(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_DIRECTORY")
    replace_files(tmp_path, {"file": lambda path: path.write_text("text")})
    assert (tmp_path / "file").read_text() == "text"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_file_has_the_permissions_of_any_new_file_or_of_the_one_before(mask, tmp_path):
    """safetensors' own files are for their owner alone."""
    before = os.umask(mask)
    try:
        model = adapted(llama())
        model.save_adapter_parameters(tmp_path)
        assert {path.name: mode(path) for path in tmp_path.iterdir()} == {
            FILE: 0o666 & ~mask, "hybrid_adapter_config.json": 0o666 & ~mask
        }  # fmt: skip
        for given in (0o644, 0o640, 0o440):
            (tmp_path / FILE).chmod(given)
            model.save_adapter_parameters(tmp_path)
            assert mode(tmp_path / FILE) == given
    finally:
        os.umask(before)


def test_what_killed_saves_left_goes_once_nobody_can_be_writing_it(tmp_path):
    day = 24 * 3600
    ages = {"dead": (2 * day, 2 * day), "begun": (2 * day, day / 2), "fresh": (60, 60)}
    for name, (made, written) in ages.items():
        folder = tmp_path / f".artemis-{name}.tmp"
        folder.mkdir()
        (folder / FILE).write_bytes(b"half")
        for path, age in ((folder / FILE, written), (folder, made)):
            os.utime(path, (time.time() - age,) * 2)
    for name in ("other.tmp", ".artemis-notes"):  # not ours, however old
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (time.time() - 9 * day,) * 2)
    replace_files(tmp_path, {"file": lambda path: path.write_text("text")})
    assert {path.name for path in tmp_path.iterdir()} == {
        "file", "other.tmp", ".artemis-notes", ".artemis-begun.tmp", ".artemis-fresh.tmp"
    }  # fmt: skip


FULL = textwrap.dedent("""
    import resource, sys
    from pathlib import Path
    import artemis
    from artemis.cli import main
    from tests.artemis.models import adapted, llama
    names = ["q_proj", "v_proj"]
    model = adapted(llama(), lora_rank=16, target_modules=names, apply_lora_to=names)
    artemis.quantize_adapter_model(model, adapter_bits=32, progress=False)
    folder = sys.argv[1]
    saves = (
        lambda: model.save_adapter_parameters(folder),
        lambda: artemis.save_quantized(model, folder),
        lambda: artemis.export_adapter(model, folder),
    )
    for save in saves:
        save()
    before = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    model.hybrid_adapter.lora_b["model/layers/0/self_attn/q_proj"].data.add_(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
    for save in saves:
        try:
            save()
        except OSError as error:
            print(error)
    assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == before
    sys.exit(main(["export", folder, folder]))
""")


def test_a_full_disk_is_an_error_of_the_system_and_harms_no_file(tmp_path):
    """A limit on the size of files stands for it."""
    child = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    names = (FILE, "quantized_base.safetensors", "adapter_model.safetensors")
    lines = child.stdout.splitlines()
    assert len(lines) == len(names) and child.returncode == 1, child.stderr
    for name, line in zip(names, lines, strict=True):
        assert line.startswith(f"{tmp_path / name}: not written (") and "File too large" in line
    assert child.stderr.splitlines()[-1].startswith(f"artemis export: {tmp_path / names[-1]}: not")
    assert "Traceback" not in child.stderr


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
