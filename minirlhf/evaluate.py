"""The command `python -m minirlhf.evaluate`: see minirlhf/tools/evaluate.py."""

if __name__ == "__main__":
    __import__("runpy").run_module("minirlhf.tools.evaluate", run_name="__main__", alter_sys=True)
