"""The command `python -m kernels.audit`, and its `Case`; the code is in kernels/tools/audit.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("kernels.tools.audit", run_name="__main__", alter_sys=True)
else:
    from kernels.tools.audit import Case  # noqa: F401
