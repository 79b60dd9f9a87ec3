"""The model of every arm: a pretrained encoder, the mean of its outputs, a linear head."""

import hashlib
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from ...errors import AdapterError
from ...training import attention_for, default_device
from .data import Batch, Examples

_PREDICTED = 64  # examples a forward pass without gradients


class Classifier(nn.Module):
    """Logits fp32 [batch, classes] from the mean over a text's tokens; with labels a loss too."""

    def __init__(self, encoder: nn.Module, classes: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, input_ids, attention_mask, labels=None) -> dict[str, torch.Tensor]:
        logits = self.head(self.features(input_ids, attention_mask))
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    def features(self, input_ids, attention_mask) -> torch.Tensor:
        """Mean of the last hidden states over the tokens that are none of padding, fp32."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        kept = attention_mask[..., None].float()
        return (states.last_hidden_state.float() * kept).sum(1) / kept.sum(1)


@dataclass(frozen=True)
class Pretrained:
    """A pretrained encoder on disk, and the precision that arms run it in.

    `dtype` is what a frozen base is held in; one that trains is held in float32 and runs under
    autocast to it.
    """

    path: Path
    dtype: torch.dtype
    length: int

    @property
    def fingerprint(self) -> str:
        """Of the files at `path`."""
        digest = hashlib.sha256()
        for file in sorted(file for file in self.path.iterdir() if file.is_file()):
            with file.open("rb") as content:
                digest.update(file.name.encode())
                digest.update(hashlib.file_digest(content, "sha256").digest())
        return digest.hexdigest()[:16]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises AdapterError where there is none at `path`."""
        if not self.path.is_dir():
            raise AdapterError(f"--model: got {self.path}, allowed: the folder of an encoder")
        try:
            return AutoTokenizer.from_pretrained(self.path)
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from None

    def classifier(self, classes: int, frozen: bool) -> Classifier:
        """A new copy with a head that is not trained yet."""
        device = default_device()
        dtype = self.dtype if frozen else torch.float32
        try:
            encoder = AutoModel.from_pretrained(
                self.path,
                dtype=dtype,
                attn_implementation=attention_for(self.dtype, device, self.length),
            )
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from None
        return Classifier(encoder, classes).to(device)

    def autocast(self, model: Classifier):
        """Where the encoder is held in float32 though products are to run in another dtype."""
        parameter = next(model.encoder.parameters())
        if parameter.dtype == self.dtype:
            return nullcontext()
        return torch.autocast(parameter.device.type, self.dtype)

    def _unreadable(self, error: Exception) -> AdapterError:
        reason = str(error).strip().split("\n", 1)[0]
        return AdapterError(f"--model: cannot load {self.path}: {reason}")


@torch.no_grad()
def outputs(
    pretrained: Pretrained, model: Classifier, examples: Examples, pad: int, name: str = "logits"
) -> torch.Tensor:
    """Logits or features of every example, fp32 [examples, size] on the CPU."""
    model.eval()
    order, device = examples.by_length(), model.head.weight.device
    starts = range(0, len(order), _PREDICTED)
    found = []
    for start in tqdm(starts, f"{name} of {len(order)} texts", disable=None, leave=False):
        batch = examples.batch(order[start : start + _PREDICTED], pad)
        inputs: Batch = {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}
        with pretrained.autocast(model):
            value = model.features(**inputs) if name == "features" else model(**inputs)["logits"]
        found.append(value.float().cpu())
    values = torch.cat(found)
    return values[torch.tensor(order).argsort()]
