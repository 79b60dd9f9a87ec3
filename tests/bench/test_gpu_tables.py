"""Tables of what a GPU measured: the last run of each section, and which way ratios point."""

from bench import gpu_tables

GPU = {"name": "NVIDIA H200", "driver": "1"}
VERSIONS = {"python": "3.12", "torch": "2.11"}


def head(run: str, gpu=GPU, tiny=False) -> dict:
    return {
        "kind": "run", "run": run, "gpu": gpu, "tiny": tiny, "versions": VERSIONS, "code": "c0de",
        "time": "2026-01-02T03:04:05",
    }  # fmt: skip


def kernel(run: str, provider: str, ms: float, **more) -> dict:
    about = {"m": 8192, "k": 4096, "n": 4096, "r": 16, "dropout": 0.1, "pass": "both"}
    return {
        "kind": "kernel", "section": "kernels", "run": run, "op": "lora_linear",
        "provider": provider, "ms": {"p50": ms}, "strategy": "split", **about, **more,
    }  # fmt: skip


def cells(table: str) -> list[dict[str, str]]:
    titles, _, *lines = (line[2:-2].split(" | ") for line in table.splitlines())
    return [dict(zip(titles, line, strict=True)) for line in lines]


LAYER = [kernel("a", who, ms) for who, ms in (("artemis", 2.0), ("peft", 3.0), ("bare", 1.0))]


def test_a_peers_time_is_over_ours_and_ours_over_the_bare_products():
    (line,) = cells(gpu_tables.layers([head("a"), *LAYER]))
    assert line["ms"] == "2" and line["× PEFT"] == "1.5" and line["÷ bare products"] == "2"
    assert line["× plain torch"] == "" and line["layer"] == "4096 → 4096"


def test_of_each_section_the_last_run_on_a_gpu_counts():
    later = [kernel("b", "artemis", 1.0), kernel("b", "peft", 3.0)]
    elsewhere = [kernel("c", "artemis", 9.0), kernel("d", "artemis", 9.0)]
    heads = [head("a"), head("b"), head("c", gpu=None), head("d", tiny=True)]
    records = [*heads, *LAYER, *later, *elsewhere]
    (line,) = cells(gpu_tables.layers(records))
    assert line["× PEFT"] == "3" and line["÷ bare products"] == ""
    accurate = {"kind": "accuracy", "section": "accuracy", "run": "a", "op": "o", "dtype": "d"}
    records.append(accurate | {"passed": True, "ratio": 0.5})
    assert cells(gpu_tables.accuracy(records))[0]["cases"] == "1"


def test_what_was_not_timed_has_no_time():
    broken = {**kernel("a", "artemis", 1.0), "where": "out of memory"}
    del broken["ms"]
    assert gpu_tables.loss([head("a"), broken]) == ""
    whole = [head("a"), broken, kernel("a", "peft", 3.0)]
    assert gpu_tables.layers(whole) == ""


def passes(provider: str, ms: float, of_copy: float) -> dict:
    about = {"op": "rms_norm", "what": "weight frozen", "size": "8192×4096", "pass": "both"}
    return about | {
        "kind": "between", "section": "groups", "run": "a", "provider": provider,
        "ms": {"p50": ms}, "of_copy": of_copy,
    }  # fmt: skip


def test_between_products_beside_torch_and_a_copy():
    rows = [head("a"), passes("torch", 6.0, 0.15), passes("artemis", 2.0, 0.9)]
    (line,) = cells(gpu_tables.between(rows))
    assert line["× torch"] == "3" and line["ms"] == "2" and line["torch's"] == "0.15"
    assert line["of"] == "weight frozen, 8192×4096" and line["of the copy's bandwidth"] == "0.9"
    broken = {name: cell for name, cell in rows[2].items() if name not in ("ms", "of_copy")}
    assert gpu_tables.between([head("a"), rows[1], broken]) == ""


def test_a_step_has_its_speed_by_the_clock_by_busy_time_and_as_a_graph():
    row = {
        "kind": "train", "section": "models", "run": "a", "model": "llama-2-7b", "layers": 2,
        "tokens": 8192, "arm": "hybrid", "ms": {"p50": 4.0}, "busy_ms": 2.0, "peak_gb": 5.0,
        "speedup": {"full-bf16": {"p50": 1.1}}, "busy_speedup": {"full-bf16": 1.2},
        "graph_ms": {"p50": 2.5}, "graph_speedup": {"full-bf16": {"p50": 1.3}},
        "kernels": [["void at::native::(anonymous namespace)::add<float>(int)", 3, 1.5]],
    }  # fmt: skip
    (line,) = cells(gpu_tables.training([head("a"), row]))
    assert [line[t] for t in ("× full bf16", "× by busy time", "× as graphs")] == [
        "1.1", "1.2", "1.3"
    ]  # fmt: skip
    assert float(line["predicted ×"]) > 1
    records = [head("a"), row | {"tokens": 1024}, row, row | {"arm": "floor"}]
    text = gpu_tables.short(records)
    assert [each["tokens a step"] for each in cells(text.split("\n\n")[0])] == ["1,024", "8,192"]
    assert "code `c0de`" in text and cells(text.split("\n\n")[0])[0]["× by busy time"] == "1.2"
    (line,) = cells(gpu_tables.kernels([head("a"), row]))
    assert line["kernel"] == "`at::native::add`" and line["launches"] == "3"


def test_the_origin_names_the_gpu_and_the_code():
    text = gpu_tables.origin([head("a"), *LAYER])
    assert text == "- kernels: NVIDIA H200, driver 1; python 3.12, torch 2.11; code `c0de`, " + (
        "2026-01-02.\n"
    )
