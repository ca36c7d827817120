"""A run on one page: `python -m minirlhf.report`.

`__main__.py` is the command.  `results.py` reads results.json, `facts.py` why.json, `follow.py` the files
that grow while a run goes; `checked.py` refuses what is damaged in them.  `page.py` writes the page around
the files in static/, `plot.py` the PNG beside it, and `watch.py` serves the page while a run goes.
"""
