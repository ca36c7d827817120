"""How good is it?  Correlations, intervals, agreement between raters, and the baselines that a reward model must beat."""
