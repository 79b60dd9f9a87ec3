"""The golden resource budget: registers and shared memory of every kernel, case and chip.

    python -m tests.aot.budget            print what this Triton compiles, as JSON
    python -m tests.aot.budget --write    make it the budget of this Triton's version

`budget.json` holds upper bounds keyed by Triton's version. A change of a kernel shows in its
diff: read it before committing. Compiling takes about two minutes on one core; Triton keeps the
results in its own cache.
"""

import argparse
import json
from pathlib import Path

import triton

from artemis_kernels.core.device import CHIPS, interpreting
from artemis_kernels.tuner.artefacts import Artefact, compiled, launches_of
from tests.aot.case import TARGETS
from tests.aot.cases import CASES

BUDGET = Path(__file__).with_name("budget.json")

# Instructions that the tests ask about, as regular expressions on the assembly.
INSTRUCTIONS = {
    "mma.sync": r"mma\.sync",
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mfma": r"v_mfma",
    "8 bit": (
        r"(mma\.sync\S*\.s8|wgmma\S*\.(s8|e4m3)|tcgen05\.mma\S*kind::f8f6f4|v_mfma_i32\S*i8)"
    ),
    "tf32": r".*(tf32|xf32)",
    "TMA": r"cp\.async\.bulk\.tensor",
    "vector load": r"(ld\.global\S*\.v4\.b32|cp\.async\.c[ag]\S* .*\b(16|0x10)\b|\w+_load_dwordx4)",
}


def measure(chip_name: str) -> dict[str, dict]:
    """`{"case / kernel": {registers, stack, shared, instructions}}` for one chip."""
    chip = CHIPS[chip_name]
    measured = {}
    for case in (case for case in CASES if chip_name in case.chips):
        for launch in launches_of(lambda case=case: case.launch(chip)):
            measured[f"{case.name} / {launch.kernel.__name__}"] = _summary(compiled(launch, chip))
    return measured


def _summary(artefact: Artefact) -> dict:
    counts = {name: artefact.count(pattern) for name, pattern in INSTRUCTIONS.items()}
    return {
        "registers": artefact.registers,
        "stack": artefact.stack,
        "shared": artefact.shared,
        "columns": artefact.columns,
        "instructions": {name: count for name, count in counts.items() if count},
    }


def bounds(measured: dict[str, dict]) -> dict[str, str]:
    """What the budget keeps of a measurement: one short line a kernel, so that diffs read well."""
    return {
        name: f"{one['registers']} registers, {one['shared']} bytes shared"
        for name, one in measured.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="replace this version's budget")
    parser.add_argument("--chip", choices=TARGETS, help="one chip only (not with --write)")
    options = parser.parse_args()
    if options.write and options.chip:
        parser.error("--write measures every chip; leave --chip out")
    if interpreting():
        parser.error("TRITON_INTERPRET is set; artefacts are compiled without it")
    chips = (options.chip,) if options.chip else TARGETS
    measured = {chip: measure(chip) for chip in chips}
    if not options.write:
        print(json.dumps(measured))
        return
    budget = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    budget[triton.__version__] = {chip: bounds(one) for chip, one in measured.items()}
    BUDGET.write_text(json.dumps(budget, indent=1, ensure_ascii=False) + "\n")
    print(f"{BUDGET.name}: {sum(map(len, measured.values()))} kernels for {', '.join(chips)}")


if __name__ == "__main__":
    main()
