"""Weights that can be zeroed: matrices, sensitivities, allocation, criteria, layer-wise pruning, sparse tensors."""
