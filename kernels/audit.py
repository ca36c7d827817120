"""The command `python -m kernels.audit`: see kernels/tools/audit.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("kernels.tools.audit", run_name="__main__", alter_sys=True)
