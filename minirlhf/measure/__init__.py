"""How good is it?  Correlations, intervals, agreement between people, baselines, a reward model's report."""
