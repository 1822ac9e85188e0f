"""Correlation congruence (CCKD): the loss, and the matrices that it compares."""

from __future__ import annotations

from torch import Tensor

from .. import checks, groups
from ..ops import correlation_congruence as _congruence
from ..ops.correlation_congruence.reference import Kernel
from ..types import Backend, FormName, Group, KernelName, Reduction

__all__ = ["correlation_congruence_loss", "kernel_matrix"]


def correlation_congruence_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    kernel: KernelName = "taylor_rbf",
    gamma: float = 0.4,
    order: int = 2,
    normalize: bool = True,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    form: FormName = "auto",
    backend: Backend = "auto",
    group: Group = None,
) -> Tensor:
    """Return how far the sample correlations of two networks are apart (CCKD Eq. 6).

    With a kernel κ (section 3.4), the loss is ``(1/n²) Σ_ij (κ(s_i, s_j) − κ(t_i, t_j))²``. The kernels are

    - "taylor_rbf": ``exp(−2γ) Σ_{p≤P} (2γ)^p/p! (x·y)^p`` (Eq. 9). It expands the RBF kernel of unit vectors. With
      ``normalize=False`` it is a polynomial kernel of the embeddings as they are;
    - "rbf": ``exp(−γ‖x−y‖²)``;
    - "bilinear": ``x·y``;
    - "mmd": ``|mean(x) − mean(y)|``, where a mean is over the components of an embedding.

    CCKD's total (Eq. 7) is ``α·cross_entropy + (1−α)·kd_loss + β·loss`` with α = 0 and β = 0.003.

    Args:
        student: n x d_S embeddings, float32, float64, bfloat16 or float16, any strides.
        teacher: n x d_T embeddings of the same samples. They receive a gradient only if they require one.
        kernel: κ, one of the four names.
        gamma: γ > 0 of "taylor_rbf" and "rbf".
        order: P >= 0 of "taylor_rbf".
        normalize: divide each embedding by its norm first. An embedding of norm <= 1e-12 becomes the zero vector, and
            its gradient is 0.
        mask: n bools, True for each sample that counts. The result equals the result of the batch without the other
            samples, whatever these hold. None counts all samples.
        reduction: "mean" over the n² pairs, as in the paper, or "sum".
        form: "gram" works on tiles of the n x n matrices. "feature" works on d x d sums and needs "bilinear". "auto"
            takes the cheaper form.
        backend: "auto", "reference", "native", "triton" or "library"; see ``kdkernels.use_backend``.
        group: the process group that shares the batch, "world" for the default group, or None for one process.

    Returns:
        A scalar: float64 if an input is float64, otherwise float32. "mmd" has no derivative where two means are equal.
        Its gradient is 0 there.

    Raises:
        TypeError: if an argument has the wrong type. The message names the argument, what was expected and what it got.
        ValueError: if a shape or a setting does not fit, with the same parts in the message.
        RuntimeError: if the named backend cannot run here. The message says why.

    Memory:
        n (3·d_S + d_T) numbers and two strips of min(n, 512) x n. The numbers are a packed matrix per network, and the
        gradient before and after it is scaled. The feature form has the largest d x d sum in place of the strips. A
        teacher that learns takes 2·n·d_T more. A mask takes a copy of the embeddings. With a mask, the kernels of "rbf"
        and "mmd" wait once for a GPU, to read how many samples count. A CUDA graph cannot capture them.

    Examples:
        >>> import torch
        >>> from kdkernels import correlation_congruence_loss
        >>> student, teacher = torch.randn(64, 128, requires_grad=True), torch.randn(64, 256)
        >>> correlation_congruence_loss(student, teacher, gamma=0.4, order=2).backward()
        >>> student.grad.shape
        torch.Size([64, 128])
    """
    group = groups.resolve(group)
    chosen = _kernel(kernel, gamma, order)
    if group is not None:
        from ..ops.correlation_congruence.distributed import correlation_congruence as over_ranks

        return over_ranks(student, teacher, chosen, normalize, mask, reduction, form, backend, group)
    return _congruence.correlation_congruence(
        student,
        teacher,
        kernel=chosen,
        normalize=normalize,
        mask=mask,
        reduction=reduction,
        form=form,
        backend=backend,
    )


def kernel_matrix(
    x: Tensor,
    y: Tensor | None = None,
    *,
    kernel: KernelName = "taylor_rbf",
    gamma: float = 0.4,
    order: int = 2,
    normalize: bool = True,
) -> Tensor:
    """Return the correlations κ(x_i, y_j) that the loss compares (CCKD Eqs. 5, 8, 9).

    Args:
        x: n x d embeddings, float32, float64, bfloat16 or float16, any strides.
        y: m x d embeddings. None stands for ``x``.
        kernel: κ, as in ``correlation_congruence_loss``.
        gamma: γ > 0 of "taylor_rbf" and "rbf".
        order: P >= 0 of "taylor_rbf".
        normalize: divide each embedding by its norm first.

    Returns:
        An n x m matrix, float64 if an input is float64, otherwise float32. It is differentiable.

    Raises:
        TypeError: if an argument has the wrong type. The message names the argument, what was expected and what it got.
        ValueError: if a shape or a setting does not fit, with the same parts in the message.

    Memory:
        The result is the matrix that the loss avoids. The gradient takes up to six matrices of this size, and three
        copies of x and of y.

    Examples:
        >>> import torch
        >>> from kdkernels import kernel_matrix
        >>> correlations = kernel_matrix(torch.randn(64, 128), kernel="rbf", gamma=0.4)
        >>> correlations.shape
        torch.Size([64, 64])
    """
    return _congruence.kernel_matrix(x, y, kernel=_kernel(kernel, gamma, order), normalize=normalize)


def _kernel(name: KernelName, gamma: float, order: int) -> Kernel:
    return Kernel(name, checks.positive("gamma", gamma), checks.non_negative_int("order", order))
