"""Commands around the stages: chat, evaluate, report, estimate, inspect.  Nothing on the path imports them."""
