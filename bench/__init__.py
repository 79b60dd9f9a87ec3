"""Benchmarks of this repository: what keeps its documents' figures, and what a GPU can prove.

What users run is `artemis bench`; both stand on `artemis.benchmark`.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
