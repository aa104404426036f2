"""Unstructured and n:m pruning of weight matrices: sensitivities, sparsity allocation, criteria, layer-wise pruning."""
