"""The command `python -m kernels.testing` and its library; the code is in kernels/tools/testing.py."""

if __name__ == "__main__":
    import runpy

    from kernels.tools.command import end_on_ctrl_c

    end_on_ctrl_c()
    runpy.run_module("kernels.tools.testing", run_name="__main__", alter_sys=True)
else:
    from kernels.tools.testing import Outcome, Subject, check

    __all__ = ["Outcome", "Subject", "check"]
