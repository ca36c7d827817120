"""The command `python -m minirlhf.conformance`: see minirlhf/tools/conformance/."""

if __name__ == "__main__":
    __import__("runpy").run_module("minirlhf.tools.conformance.__main__", run_name="__main__", alter_sys=True)
