"""Correlation congruence (CCKD)."""

from __future__ import annotations

from torch import Tensor

from ..ops import correlation_congruence as _congruence
from ..ops.correlation_congruence import Kernel

__all__ = ["correlation_congruence_loss", "kernel_matrix"]


def correlation_congruence_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    kernel: str = "taylor_rbf",
    gamma: float = 0.4,
    order: int = 2,
    normalize: bool = True,
    reduction: str = "mean",
    form: str = "auto",
    backend: str = "auto",
    group: object | None = None,
) -> Tensor:
    """Correlation congruence between two networks' embeddings of one batch (CCKD Eq. 6).

    ``loss = (1/n²) Σ_ij (κ(s_i, s_j) − κ(t_i, t_j))²``, where the kernel κ (section 3.4) is one of

    - "taylor_rbf": ``exp(−2γ) Σ_{p≤P} (2γ)^p/p! (x·y)^p`` (Eq. 9). It expands the RBF kernel of unit vectors: with
      ``normalize=False`` it is computed as it stands, but no longer stands for that kernel;
    - "rbf": ``exp(−γ‖x−y‖²)``;
    - "bilinear": ``x·y``;
    - "mmd": ``|mean(x) − mean(y)|``, the means taken over an embedding's components.

    CCKD's total (Eq. 7) is ``α·cross_entropy + (1−α)·kd_loss + β·loss`` with α = 0 and β = 0.003.

    Args:
        student: n x d_S embeddings, float32, float64, bfloat16 or float16, any strides.
        teacher: n x d_T; the widths may differ. Receives a gradient only if it requires one.
        kernel: κ.
        gamma: γ > 0 of "taylor_rbf" and "rbf".
        order: P >= 0 of "taylor_rbf".
        normalize: divide embeddings by their norms first; one of norm <= 1e-12 becomes the zero vector, of gradient 0.
        reduction: "mean" over the n² pairs is the paper's; "sum".
        form: "gram" works on tiles of the n x n matrices; "feature", for "bilinear" only, on d x d sums; "auto" takes
            the cheaper.
        backend: "auto", "reference", "native" or "triton".
        group: a torch.distributed process group over which the batch is spread.

    Returns:
        A scalar: float64 if either network's embeddings are, else float32. Where kernels have no derivative ("mmd" of
        equal means) the gradient is a subgradient, 0.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what it got.
        RuntimeError: when a backend asked for by name cannot run.

    Memory: n (3·d_S + d_T) numbers, which are a packed matrix of each network and the gradient before and after it is
    scaled, and two strips of min(n, 512) x n (Gram form) or the largest d x d sum (feature form). A teacher that learns
    takes 2·n·d_T more.
    """
    if group is not None:
        from ..ops.correlation_congruence.distributed import correlation_congruence as over_ranks

        chosen = Kernel(kernel, gamma, order)
        return over_ranks(student, teacher, chosen, normalize, reduction, form, backend, group)
    return _congruence.correlation_congruence(
        student,
        teacher,
        kernel=Kernel(kernel, gamma, order),
        normalize=normalize,
        reduction=reduction,
        form=form,
        backend=backend,
    )


def kernel_matrix(
    x: Tensor,
    y: Tensor | None = None,
    *,
    kernel: str = "taylor_rbf",
    gamma: float = 0.4,
    order: int = 2,
    normalize: bool = True,
) -> Tensor:
    """The correlations κ(x_i, y_j) themselves (CCKD Eqs. 5, 8, 9), for inspection.

    Args:
        x: n x d embeddings.
        y: m x d embeddings to correlate them with; ``x`` itself if None.
        kernel, gamma, order, normalize: as in ``correlation_congruence_loss``.

    Returns:
        n x m in float32 (float64 if either input is), differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what it got.

    Memory: the result is what the loss avoids holding, and with the gradient up to six matrices of its size, and three
    copies of x and of y.
    """
    return _congruence.kernel_matrix(x, y, kernel=Kernel(kernel, gamma, order), normalize=normalize)
