"""What is pushed to the Hub while a run goes on."""

from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers.trainer
from safetensors.torch import load

from artemis.training import Trainer
from tests.artemis.training.kit import assert_equal_states, blocks, hybrid, settings, trained_state

FILE, COPY = "hybrid_adapter.safetensors", "hybrid_adapter_config.json"


class Hub:
    """Keeps what a folder held at each push; pushes are done at once, or never."""

    def __init__(self, done: bool = True):
        self.done = done
        self.pushes: list[dict[str, bytes]] = []

    def create_repo(self, *args, **kwargs):
        return SimpleNamespace(repo_id="some/one")

    def upload_folder(self, folder_path, **kwargs):
        files = [path for path in Path(folder_path).iterdir() if path.is_file()]
        self.pushes.append({path.name: path.read_bytes() for path in files})
        job = Future()
        if self.done:
            job.set_result(None)
        return job


def pushed(directory, monkeypatch, strategy="every_save", done=True, model=None) -> Hub:
    hub = Hub(done)
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda *args, **kwargs: hub)
    monkeypatch.setattr(Trainer, "_finish_current_push", lambda trainer: None)  # waits for none
    arguments = settings(directory, max_steps=4, save_steps=2).arguments()
    arguments.push_to_hub, arguments.hub_strategy = True, transformers.trainer.HubStrategy(strategy)
    Trainer(hybrid() if model is None else model, arguments, train_dataset=blocks()).train()
    return hub


def test_each_push_holds_the_adapter_of_its_step(tmp_path, monkeypatch):
    model = hybrid()
    hub = pushed(tmp_path, monkeypatch, model=model)
    assert len(hub.pushes) == 2
    for step, files in zip((2, 4), hub.pushes, strict=True):
        for name in (FILE, COPY):
            assert files[name] == (tmp_path / f"checkpoint-{step}" / name).read_bytes()
    assert hub.pushes[0][FILE] != hub.pushes[1][FILE]
    assert_equal_states(load(hub.pushes[1][FILE]), trained_state(model))


@pytest.mark.parametrize(
    ("strategy", "done", "step"), [("end", True, None), ("every_save", False, 2)]
)
def test_nothing_is_laid_out_where_nothing_is_pushed(tmp_path, monkeypatch, strategy, done, step):
    """A push that is not done may be reading the files."""
    hub = pushed(tmp_path, monkeypatch, strategy, done)
    assert len(hub.pushes) == (0 if step is None else 1)
    if step is None:
        assert not (tmp_path / FILE).exists()
    else:
        expected = (tmp_path / f"checkpoint-{step}" / FILE).read_bytes()
        assert (tmp_path / FILE).read_bytes() == expected


def test_a_process_that_pushes_nothing_trains_on(tmp_path, monkeypatch):
    """Of several processes the first one pushes; transformers tells only that one of pushes."""
    monkeypatch.setattr(Trainer, "is_world_process_zero", lambda trainer: False)
    assert pushed(tmp_path, monkeypatch).pushes == []
    assert (tmp_path / "checkpoint-4").is_dir()
