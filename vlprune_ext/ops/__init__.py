"""Kernels as functions of tensors, on CPU or CUDA; each is a torch op, too: ``torch.ops.vlprune.<name>``."""

from .ablation import leave_one_out, retrieval_rank
from .attention import attention_importance
from .compaction import compact_tokens, match_tokens, merge_tokens
from .selection import diverse_tokens, select_tokens
from .weights import column_norm_sq_, nm_mask, perturb, prune_nm_, prune_smallest_, share_smallest, smallest_mask

__all__ = [
    "attention_importance",
    "column_norm_sq_",
    "compact_tokens",
    "diverse_tokens",
    "leave_one_out",
    "match_tokens",
    "merge_tokens",
    "nm_mask",
    "perturb",
    "prune_nm_",
    "prune_smallest_",
    "retrieval_rank",
    "select_tokens",
    "share_smallest",
    "smallest_mask",
]
