"""Removable units (heads, neurons, layers): candidates, ablation scores, physical removal and masking."""
