"""The kernels as functions of tensors, on CPU or CUDA. Each is a torch op, too: ``torch.ops.vlprune.<name>``."""

from .ablation import leave_one_out, retrieval_rank

__all__ = ["leave_one_out", "retrieval_rank"]
