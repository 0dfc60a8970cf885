"""Expert parallelism: experts shared out over ranks (ep), each one's hidden width over tp if wished, and their loads."""

from parallel.expert.apply import apply_experts, check_experts, sparse_layers
from parallel.expert.dispatch import AllToAllExperts, ExpertTensor, Pending
from parallel.expert.loads import share_loads, stage_sum

__all__ = [
    "AllToAllExperts",
    "ExpertTensor",
    "Pending",
    "apply_experts",
    "check_experts",
    "share_loads",
    "sparse_layers",
    "stage_sum",
]
