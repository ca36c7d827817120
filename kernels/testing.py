"""The command `python -m kernels.testing`, and its library; the code is in kernels/tools/testing.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("kernels.tools.testing", run_name="__main__", alter_sys=True)
else:
    from kernels.tools.testing import Subject, check  # noqa: F401
