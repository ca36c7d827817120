"""The command `python -m minirlhf.estimate`: see minirlhf/tools/estimate.py."""

if __name__ == "__main__":
    __import__("runpy").run_module("minirlhf.tools.estimate", run_name="__main__", alter_sys=True)
