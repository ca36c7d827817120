"""The command `python -m kernels.audit`, and its `Case`; the code is in kernels/tools/audit.py."""

if __name__ == "__main__":
    from kernels.tools.command import run_module

    run_module("kernels.tools.audit")
else:
    from kernels.tools.audit import Case  # noqa: F401
