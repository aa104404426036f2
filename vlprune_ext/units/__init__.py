"""Units that can be removed: heads, neurons, layers. Candidates, scores by ablation, removing and masking."""
