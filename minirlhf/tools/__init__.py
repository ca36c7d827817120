"""What one runs around the stages: chat, evaluate, report, estimate, inspect.  Nothing on the reading path imports these."""
