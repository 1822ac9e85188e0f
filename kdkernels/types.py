"""Types of the settings. Every list of options stands here once: the checks take it from the type."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

from torch.distributed import ProcessGroup

Backend: TypeAlias = Literal["auto", "reference", "native", "triton", "library"]
FormName: TypeAlias = Literal["auto", "gram", "feature"]
KernelName: TypeAlias = Literal["taylor_rbf", "rbf", "bilinear", "mmd"]
PatchPartition: TypeAlias = Literal["exact", "resize"]
Partition: TypeAlias = Literal[PatchPartition, "split"]
Reduction: TypeAlias = Literal["mean", "sum"]
LocalReduction: TypeAlias = Literal["batchmean", "sum", "mean"]
RowReduction: TypeAlias = Literal["batchmean", "mean", "sum", "none"]
LabelReduction: TypeAlias = Literal["mean", "sum", "none"]
DivergenceName: TypeAlias = Literal["forward", "reverse", "jsd"]
Relation: TypeAlias = Literal["full", "intra", "inter_same", "inter_diff"]
Allocation: TypeAlias = Literal["attention", "equal", "shared"]
Comparison: TypeAlias = Literal["mse", "hinge", "kl", "cross_entropy"]
ContrastiveComparison: TypeAlias = Literal["kl", "cross_entropy"]
Clip: TypeAlias = Literal["both", "teacher", "teacher_only"]
Across: TypeAlias = Literal["image", "batch"]
Axis: TypeAlias = Literal["tokens", "channels"]
Group: TypeAlias = ProcessGroup | Literal["world"] | None

BACKENDS = get_args(Backend)
FORMS = get_args(FormName)
KERNELS = get_args(KernelName)
PATCH_PARTITIONS = get_args(PatchPartition)
PARTITIONS = get_args(Partition)
REDUCTIONS = get_args(Reduction)
LOCAL_REDUCTIONS = get_args(LocalReduction)
ROW_REDUCTIONS = get_args(RowReduction)
LABEL_REDUCTIONS = get_args(LabelReduction)
DIVERGENCES = get_args(DivergenceName)
RELATIONS = get_args(Relation)
ALLOCATIONS = get_args(Allocation)
COMPARISONS = get_args(Comparison)
CONTRASTIVE_COMPARISONS = get_args(ContrastiveComparison)
CLIPS = get_args(Clip)
ACROSS = get_args(Across)
AXES = get_args(Axis)
