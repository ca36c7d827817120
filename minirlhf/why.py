"""The command `python -m minirlhf.why`: see minirlhf/tools/why.py."""

if __name__ == "__main__":
    __import__("runpy").run_module("minirlhf.tools.why", run_name="__main__", alter_sys=True)
