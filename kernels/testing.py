"""The command `python -m kernels.testing` and its library; the code is in kernels/tools/testing.py."""

if __name__ == "__main__":
    from kernels.tools.command import run_module

    run_module("kernels.tools.testing")
else:
    from kernels.tools.testing import Outcome, Subject, check  # noqa: F401
