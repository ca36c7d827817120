"""The command `python -m minirlhf.report`: see minirlhf/tools/report."""

if __name__ == "__main__":
    __import__("runpy").run_module("minirlhf.tools.report", run_name="__main__", alter_sys=True)
