"""The suite catches every bug of broken.py by the property meant for it, and finds no fault with the oracles themselves."""

import pytest
from broken import BUGS, HEALTHY

from kernels.tools.properties import PROPERTIES
from kernels.tools.testing import OPS, Subject, check

HERE = [(bug, name) for bug in BUGS for name in bug.properties]
ALL = [(op, name) for op in OPS for name in PROPERTIES[op]]


@pytest.mark.parametrize(("bug", "name"), HERE, ids=[f"{bug.function.__name__}-{name}" for bug, name in HERE])
def test_caught(bug, name):
    outcome = check(Subject(bug.function, bug.op), name, max_examples=200, shrink=False)
    assert outcome.status == "FAIL", outcome


@pytest.mark.parametrize(("op", "name"), ALL, ids=[f"{op}-{name}" for op, name in ALL])
def test_healthy(op, name):
    outcome = check(Subject(HEALTHY[op], op), name)
    assert outcome.status == "pass", outcome


def test_every_property_catches_something():
    assert {name for names in PROPERTIES.values() for name in names} == {
        name for bug in BUGS for name in bug.properties
    }
