"""Collecting human feedback: a store, a web page, a terminal, statistics and an export."""
