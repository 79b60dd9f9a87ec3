"""The table of docs/adapters.md from what `python -m bench.head_adaptation` wrote."""

from statistics import mean

from artemis.benchmark.records import Record

from .head_adaptation import ARMS, FULL, KIND, TOKENS


def table(records: list[Record]) -> str:
    """Losses of every arm, and the share of full fine-tuning's improvement in each seed."""
    known = {(r["tokens"], r["arm"], r["seed"]): r for r in records if r.get("kind") == KIND}
    lines = [
        "| a token is | arm | trained parameters | loss | of full's improvement | each seed |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for tokens in TOKENS:
        base = known.get((tokens, None, None))
        seeds = sorted(seed for t, arm, seed in known if t == tokens and arm == ARMS[-1])
        if base is None or not seeds:
            return ""
        lines.append(f"| {tokens} | no adapter | 0 | {base['loss']:.4f} | | |")
        for arm in ARMS:
            runs = [known[tokens, arm, seed]["loss"] for seed in seeds]
            full = [known[tokens, FULL, seed]["loss"] for seed in seeds]
            shares = [
                (base["loss"] - loss) / (base["loss"] - best)
                for loss, best in zip(runs, full, strict=True)
            ]
            lines.append(
                f"| {tokens} | {arm} | {known[tokens, arm, seeds[0]]['parameters']:,}"
                f" | {mean(runs):.4f} | {mean(shares):.0%} | {min(shares):.0%} to"
                f" {max(shares):.0%} |"
            )
    last = [r["run"] for r in records if r.get("kind") == KIND][-1]
    head = next(r for r in records if r.get("kind") == "run" and r["run"] == last)
    recipe = head["recipe"]
    setting = (
        f"Hidden {recipe['hidden_size']}, {recipe['layers']} layers, {recipe['adapt_steps']} steps"
        f" of {recipe['batch_size'] * recipe['sequence_length']:,} tokens, {len(seeds)} seeds;"
        f" rates {recipe['adapt_full_rate']:g} and {recipe['adapt_hybrid_rate']:g}. torch"
        f" {head['versions']['torch']}, {head['time'][:10]}."
    )
    return "\n".join([*lines, "", setting, ""])
