"""Properties of RLHF's functions, to be asked of anyone's: `python -m minirlhf.conformance`.

`subject.py` calls a function of any signature, `signals.py` and `losses.py` hold the properties, `__main__.py`
is the command. As a library:

    from minirlhf.tools.conformance.subject import Subject, check
    from minirlhf.tools.conformance.kinds import KINDS, PROPERTIES
    for asked in PROPERTIES["policy_loss"]:
        print(check(Subject(my_loss, KINDS["policy_loss"]), asked))
"""
