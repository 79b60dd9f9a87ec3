"""The documents hold to the code: names, signatures, defaults, links and imports."""

import ast
import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import pytest
import yaml

from artemis import HybridAdapterConfig
from artemis.benchmark.arms import ARMS
from artemis.cli.demo.corpus import byte_pairs
from artemis.hybrid import _METHODS
from artemis.training import BaseConfig, DataConfig, RunConfig, TrainingConfig
from tests.artemis.models import llama

ROOT = Path(__file__).parents[1]
API, GUIDE = ROOT / "docs/api.md", ROOT / "docs/user-guide.md"
BENCHMARKS = ROOT / "docs/benchmarks.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
MODULES = (
    "artemis_kernels",
    "artemis_kernels.nn",
    "artemis",
    "artemis.utils.hybrid_adapter",
    "artemis.utils.quantization",
    "artemis.training",
)
MISSING = dataclasses.MISSING
PLAIN = (str, int, float, bool, type(None))  # defaults that a signature shows
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
#: [text](target), where the target is no address of another site.
LINK = re.compile(r"\[[^\]]*\]\((?!https?:)([^)\s]+)\)")


def section(document: Path, title: str) -> str:
    """The text under one heading, up to the next of its level or above."""
    text = document.read_text(encoding="utf-8")
    marks, rest = re.search(rf"^(#+) {re.escape(title)}\n(.*)", text, re.M | re.S).groups()
    return re.split(rf"^#{{1,{len(marks)}}} ", rest, flags=re.M)[0]


def blocks(document: Path, language: str) -> list[str]:
    found = FENCE.findall(document.read_text(encoding="utf-8"))
    return [text for kind, text in found if kind == language]


def rows(text: str) -> dict[str, str]:
    """First cell, without its backticks -> second cell, of every table row in `text`."""
    return dict(re.findall(r"^\| `([^`|]+)` \| ([^|]+?) \|", text, re.M))


def anchors(document: Path) -> set[str]:
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", MODULES)
def test_api_names_everything_public(name):
    text = section(API, f"`{name}`")
    named = set(re.findall(r"`(\w+)(?:\([^`]*\))?`", text))
    assert set(importlib.import_module(name).__all__) <= named


@pytest.mark.parametrize("name", MODULES)
def test_api_signatures(name):
    module = importlib.import_module(name)
    for entry in rows(section(API, f"`{name}`")):
        written, parenthesis, arguments = entry.partition("(")
        if not parenthesis or not hasattr(module, written) or "**fields" in arguments:
            continue
        parameters = inspect.signature(getattr(module, written)).parameters.values()
        given = ast.parse(f"def f({arguments}: pass").body[0].args
        names = [a.arg for a in (*given.args, *given.kwonlyargs)]
        names += [a.arg for a in (given.vararg, given.kwarg) if a]
        assert names == [p.name for p in parameters], entry
        defaults = [ast.literal_eval(d) for d in (*given.defaults, *given.kw_defaults) if d]
        real = [p.default for p in parameters if p.default is not p.empty]
        written, real = ([d for d in ds if isinstance(d, PLAIN)] for ds in (defaults, real))
        assert written == real, entry


def test_api_names_the_methods_on_the_model():
    table = rows(section(API, "Methods on the model"))
    assert {entry.partition("(")[0] for entry in table} == set(_METHODS)


def test_benchmarks_say_what_every_arm_is():
    named = set(rows(section(BENCHMARKS, "Arms")))
    own = {name for name, arm in ARMS.items() if not (arm.recomputes or arm.is_fused)}
    assert named == own | {"…-checkpointed", "…-fused"}


def default_of(entry: dataclasses.Field):
    if entry.default is not MISSING:
        default = entry.default
    elif entry.default_factory is not MISSING:
        default = entry.default_factory()
    else:
        return MISSING
    return list(default) if isinstance(default, tuple) else default


@pytest.mark.parametrize(
    ("config", "title"),
    [
        (HybridAdapterConfig, "The configuration"),
        (BaseConfig, "`artemis train`"),
        (DataConfig, "`artemis train`"),
        (TrainingConfig, "`artemis train`"),
    ],
)
def test_guide_tables_hold_every_key_and_its_default(config, title):
    table = rows(section(GUIDE, title))
    for entry in dataclasses.fields(config):
        cell = table[entry.name]
        written = MISSING if cell == "required" else yaml.safe_load(cell.strip("`"))
        assert written == default_of(entry), entry.name


def test_guide_tables_hold_no_other_key():
    known = {item.name for item in dataclasses.fields(HybridAdapterConfig)}
    assert set(rows(section(GUIDE, "The configuration"))) == known
    sections = (RunConfig, BaseConfig, DataConfig, TrainingConfig)
    known = {item.name for config in sections for item in dataclasses.fields(config)}
    assert set(rows(section(GUIDE, "`artemis train`"))) == known


def test_guide_training_file_is_whole_and_valid():
    (text,) = [text for text in blocks(GUIDE, "yaml") if "\ntraining:" in text]
    values = yaml.safe_load(text)
    RunConfig.from_dict(values)
    assert set(values) == {item.name for item in dataclasses.fields(RunConfig)}
    sections = (("base", BaseConfig), ("data", DataConfig), ("training", TrainingConfig))
    for name, config in sections:
        assert set(values[name]) == {item.name for item in dataclasses.fields(config)}


def test_guide_adapter_sections_are_valid():
    for text in blocks(GUIDE, "yaml"):
        HybridAdapterConfig.from_dict(yaml.safe_load(text)["hybrid_adapter"])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    for link in LINK.findall(text):
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_document_is_linked_from_another():
    linked = set()
    for document in DOCUMENTS:
        targets = LINK.findall(FENCE.sub("", document.read_text(encoding="utf-8")))
        paths = {(document.parent / target.partition("#")[0]).resolve() for target in targets}
        linked |= paths - {document.resolve(), document.parent.resolve()}
    alone = set(ROOT.glob("docs/**/*.md")) - linked
    assert not alone


@pytest.mark.parametrize("document", [ROOT / "README.md", GUIDE], ids=lambda path: path.name)
def test_snippets_parse_and_their_imports_work(document):
    snippets = blocks(document, "python")
    assert snippets
    for text in snippets:
        tree = ast.parse(text)
        imports = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
        exec(compile(ast.Module(imports, []), str(document), "exec"), {})


@pytest.mark.parametrize(
    ("document", "made"),
    [
        (ROOT / "README.md", ("adapter",)),
        (API, ()),
        (GUIDE, ("my-adapter", "base-int8", "ranks.png", "out-longer")),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_blocks_run_in_order(tmp_path, monkeypatch, document, made):
    """A reader who types them one after another, with a small model, a text and the guide's YAML.

    No block leaves the model in training mode, with dropout on.
    """
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    tokenizer = byte_pairs()
    size = dict(vocab_size=len(tokenizer), bos_token_id=256, eos_token_id=256, pad_token_id=256)
    llama(**size).save_pretrained("path/to/llama")
    tokenizer.save_pretrained("path/to/llama")
    Path("train.txt").write_text(GUIDE.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    Path("config.yaml").write_text(blocks(GUIDE, "yaml")[0])
    names = {}
    for number, text in enumerate(blocks(document, "python"), 1):
        exec(compile(text, f"{document.name}, python block {number}", "exec"), names)
        assert "model" not in names or not names["model"].training, text
    assert all(Path(name).exists() for name in made)
