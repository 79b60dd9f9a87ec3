"""`WEIGHTS_READ` against what transformers' own sources read past their linear layers."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers

from artemis.architectures import WEIGHTS_READ

#: The latest version whose reads were all looked at. Raise it with a new one: what the test then
#: finds goes into the table, or below.
EXAMINED = (5, 23)
#: Reads that no model reaches.
UNREACHED = {("DisentangledSelfAttention", "in_proj")}  # only with z_steps > 1, and it is 0
#: Functions that run before there is an adapter.
STARTING = ("__init__", "_init", "init_", "tie_", "_tie")

LINEAR = re.compile(r"self\.(\w+)(?::[^=\n]+)? = .*\b(?:nn\.Linear|Conv1D)\(")
DESCRIBED = r"(?:dtype|device|shape|ndim|size\(|numel|requires_grad|is_meta)"
READ = re.compile(rf"(\w+)\.(\w+)(?:\[\w+\])?\.weight\b(?!\.{DESCRIBED})")


def reads(text: str) -> Iterator[tuple[str, str]]:
    """(class, name) of every linear layer whose weight `text` reads itself.

    The class is the one that reads where it reads a child of its own, else any that is defined in
    `text` and in the table with that name.
    """
    linear, listed = set(LINEAR.findall(text)), re.findall(r"^class (\w+)", text, re.M)
    cls = function = None
    for line in text.splitlines():
        if begun := re.match(r"class (\w+)|    def (\w+)", line):
            cls, function = begun[1] or cls, begun[2]
        elif ".weight" not in line or re.search(r"isinstance\(|hasattr\(|^\s*#", line):
            continue
        elif function is not None and not function.startswith(STARTING):
            for owner, name in READ.findall(line):
                if name in linear:
                    holders = (c for c in listed if name in WEIGHTS_READ.get(c, ()))
                    yield cls if owner == "self" else next(holders, cls), name


def test_every_weight_that_a_model_reads_past_its_layer_is_in_the_table():
    version = tuple(map(int, re.findall(r"\d+", transformers.__version__)[:2]))
    if version > EXAMINED:
        pytest.skip(f"transformers {transformers.__version__} is later than {EXAMINED}")
    sources = sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"))
    found = {(source.stem, *read) for source in sources for read in reads(source.read_text())}
    assert len(found) > 20
    known = {(cls, name) for cls, names in WEIGHTS_READ.items() for name in names} | UNREACHED
    assert {read for read in found if read[1:] not in known} == set()


SOURCE = """
class Holder(nn.Module):
    def __init__(self):
        self.inner = nn.Linear(4, 4, bias=False)
        self.many = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.norm = nn.LayerNorm(4)
        self.inner.weight.zero_()

    def forward(self, x):
        x = self.inner(x.to(self.inner.weight.dtype))
        return {} * self.norm.weight
"""


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("x", []),
        ("x @ self.inner.weight.t()", ["inner"]),
        ("F.linear(x, self.many[i].weight)", ["many"]),
        ("self.block.inner.weight.mul_(2)", ["inner"]),
        ("x.to(self.inner.weight.device)", []),
    ],
)
def test_reads_and_changes_are_seen(code, found):
    assert list(reads(SOURCE.format(code))) == [("Holder", name) for name in found]
