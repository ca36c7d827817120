"""One recipe a file: a task with its data, its commands and its table.  See benchmarks/tasks.py.

A recipe is a module with

    run(home: Path, seed: int, smoke: bool) -> dict    trains and measures one seed; files go below `home`
    tables(results: dict) -> list[str]                 in Markdown, of what tasks.py wrote: {"seeds": {seed: dict}}

and a docstring, whose first line says what the task is.  common.py holds what recipes share.
"""
