"""Faults keep up with the code: each still finds what it replaces."""

from tests.mutants.__main__ import ROOT
from tests.mutants.faults import FAULTS


def test_every_fault_finds_its_text_once():
    found = {fault.name: (ROOT / fault.file).read_text().count(fault.old) for fault in FAULTS}
    assert {name: count for name, count in found.items() if count != 1} == {}


def test_no_two_faults_share_a_name():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
