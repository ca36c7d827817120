"""One recipe a file: a task with its data, its commands and its table.  See benchmarks/tasks.py.

A recipe is a module with

    run(home: Path, seed: int, smoke: bool, *files: Path) -> dict    trains and measures one seed, below `home`
    tables(results: dict) -> list[str]       in Markdown, of what tasks.py wrote: {"seeds": {seed: dict}}

and a docstring, whose first line says what the task is.  A recipe that reads files of other people also has

    DATA                                     what they are, in the order of --data
    made_up(home: Path) -> list[Path]        small ones of the same form, which a smoke run reads

common.py holds what recipes share, judged.py what those with people's judgements share, frozen.py how a
reward model is fitted to a language model that is not trained, and assistant.py how SmolLM2-Instruct answers.
"""
