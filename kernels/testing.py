"""The command `python -m kernels.testing`: see kernels/tools/testing.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("kernels.tools.testing", run_name="__main__", alter_sys=True)
