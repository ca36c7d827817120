"""The command `python -m kernels.audit`, and its `Case`; the code is in kernels/tools/audit.py."""

if __name__ == "__main__":
    import runpy

    from kernels.tools.command import end_on_ctrl_c

    end_on_ctrl_c()
    runpy.run_module("kernels.tools.audit", run_name="__main__", alter_sys=True)
else:
    from kernels.tools.audit import Case

    __all__ = ["Case"]
