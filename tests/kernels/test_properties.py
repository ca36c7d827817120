"""Every property of kernels/tools/properties.py, asked of our four functions: on this path, under Triton's interpreter, and
on a GPU (where KERNEL_EXAMPLES limits the examples per property)."""

import os
from functools import cache

import pytest

import kernels
from kernels.tools.properties import PROPERTIES
from kernels.tools.testing import EXAMPLES, OPS, Subject, check

ASKED = [(op, name) for op in OPS for name in PROPERTIES[op]]
each_property = pytest.mark.parametrize(("op", "name"), ASKED, ids=[f"{op}-{name}" for op, name in ASKED])


@cache
def subject(op: str, device: str) -> Subject:
    return Subject(getattr(kernels, op), op, device)


@each_property
def test_property(op, name):
    outcome = check(subject(op, "cpu"), name)
    assert outcome.status == "pass", outcome  # not "-": there is nothing that our functions cannot be asked


@pytest.mark.gpu
@each_property
def test_property_on_a_gpu(op, name):
    outcome = check(subject(op, "cuda"), name, int(os.environ.get("KERNEL_EXAMPLES", EXAMPLES)))
    assert outcome.status == "pass", outcome


def test_names_are_the_same():
    assert sorted(kernels.__all__) == sorted(OPS) == sorted(PROPERTIES)


def lines_of(done) -> list[str]:
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    return done.stdout.splitlines()


@pytest.mark.long
@pytest.mark.parametrize("op", OPS)
def test_property_under_the_interpreter(op, interpreted):
    lines = lines_of(interpreted[op].result())
    assert [line.split()[:2] for line in lines[1:-1]] == [["pass", name] for name in PROPERTIES[op]]


@pytest.mark.long
def test_other_files_under_the_interpreter(interpreted):
    lines_of(interpreted["files"].result())
