"""docs/peer_bugs.md: each defect that others had is there once, with tests that are here."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
TABLE = (TESTS.parent / "docs" / "peer_bugs.md").read_text(encoding="utf-8")


def test_every_row_names_tests_that_exist():
    defined = {
        name
        for file in TESTS.glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    rows = {
        int(row[0]): re.findall(r"`(test_\w+)`", row[1])
        for row in re.findall(r"^\| (\d+) (.*)$", TABLE, re.M)
    }
    assert list(rows) == list(range(1, 53))
    for row, tests in rows.items():
        assert tests, row
        assert set(tests) <= defined, row


def test_every_test_of_a_defect_is_in_a_row():
    """Those whose docstring names a thread of another project."""
    thread = r'def (test_\w+)\([^)]*\):\n    """[^\n]*#\d'
    named = {
        name
        for file in TESTS.glob("test_peer_bugs_*.py")
        for name in re.findall(thread, file.read_text(encoding="utf-8"))
    }
    assert named
    assert named <= set(re.findall(r"`(test_\w+)`", TABLE))
