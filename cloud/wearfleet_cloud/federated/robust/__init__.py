"""Robust aggregation: rules that a few bad clients cannot move far, what is checked before, and evidence of it."""
