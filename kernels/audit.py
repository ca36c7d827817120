"""The command `python -m kernels.audit`, and its `Case`; the code is in kernels/tools/audit.py."""

if __name__ == "__main__":
    __import__("kernels.tools.command", fromlist=["run_module"]).run_module("kernels.tools.audit")
else:
    from kernels.tools.audit import Case

    __all__ = ["Case"]
