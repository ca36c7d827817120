"""The command `python -m minirlhf.chat`: see minirlhf/tools/chat.py."""

if __name__ == "__main__":
    __import__("runpy").run_module("minirlhf.tools.chat", run_name="__main__", alter_sys=True)
