"""Commands around the stages: chat, evaluate, report, estimate, inspect.  No stage imports them."""
