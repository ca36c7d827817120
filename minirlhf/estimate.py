"""The command `python -m minirlhf.estimate`: see minirlhf/tools/estimate.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("minirlhf.tools.estimate", run_name="__main__", alter_sys=True)
