"""The LKD loss against an independent computation of its equations (tests/oracle.py), and its contracts."""

from __future__ import annotations

import re

import oracle
import pytest
import torch
from helpers import DTYPES, HALF_DTYPES, assert_as_good_as, assert_close, loss_and_gradients, relative_error
from torch import Tensor

from kdkernels import explain, local_correlation, local_correlation_loss

FORMS = ("auto", "gram", "feature")
every_form = pytest.mark.parametrize("form", FORMS)


def compute(student, teacher, k, **settings) -> tuple[Tensor, list[Tensor]]:
    """Return the loss and its gradients to every map of the student, then of the teacher. Strides are kept."""
    split = len(oracle.stages(student))

    def loss(*maps: Tensor) -> Tensor:
        if isinstance(student, Tensor):
            return local_correlation_loss(*maps, k, **settings)
        return local_correlation_loss(maps[:split], maps[split:], k, **settings)

    maps = [x.detach().requires_grad_() for x in (*oracle.stages(student), *oracle.stages(teacher))]
    return loss_and_gradients(loss, *maps)


def agree(student, teacher, k, *, backend: str, form: str = "auto", **settings) -> None:
    """Assert that loss and gradients equal the oracle's, with the right shapes and dtypes. For float32 and float64."""
    loss, gradients = compute(student, teacher, k, backend=backend, form=form, **settings)
    exact_loss, exact_gradients = oracle.local_correlation_loss(student, teacher, k, **settings)
    inputs = [*oracle.stages(student), *oracle.stages(teacher)]
    assert loss.dtype == (torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32)
    # A float32 map in a float64 loss is normalised in float32.
    coarse = any(x.dtype != torch.float64 for x in inputs)
    assert_close(loss.float() if coarse else loss, exact_loss, "loss")
    for value, gradient, exact in zip(inputs, gradients, exact_gradients, strict=True):
        assert gradient.dtype == value.dtype
        assert_close(gradient.float() if coarse else gradient, exact, "gradient")


def relu_maps(*shape: int) -> Tensor:
    """Return maps as after a ReLU: non-negative, and similar from image to image."""
    return torch.relu(torch.randn(shape) + torch.randn(shape[1:]))


def integer(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


def pick(options):
    return options[integer(0, len(options) - 1)]


# Values ---------------------------------------------------------------------------------------------------------------


@every_form
def test_random_problems(backend, form):
    for _ in range(8):
        n, dtype = integer(2, 5), pick((torch.float32, torch.float64))
        ks = [integer(2, 3) for _ in range(integer(1, 3))]
        student, teacher = (
            [torch.randn(n, integer(2, 9), k * integer(1, 3), k * integer(1, 3), dtype=dtype) for k in ks]
            for _ in range(2)
        )
        weights = [pick((0.0, 1.0, float(torch.rand(())) + 0.1, 3.5)) for _ in range(3)]
        weights[integer(0, 2)] = 1.0
        settings = {"weights": weights, "reduction": pick(("batchmean", "sum", "mean"))}
        agree(student, teacher, ks, backend=backend, form=form, **settings)


@every_form
@pytest.mark.parametrize(
    ("student", "teacher", "k"),
    [
        ((1, 3, 6, 6), (1, 5, 3, 9), 3),  # one image: Eq. 6 is empty
        ((7, 3, 5, 3), (7, 2, 1, 4), 1),  # one patch per image: Eq. 6 is empty too
        ((3, 2, 4, 4), (3, 2, 4, 4), 4),  # one pixel per patch
        ((2, 37, 4, 2), (2, 1, 14, 6), 2),  # more and fewer numbers per row than rows
        ((17, 3, 6, 9), (17, 4, 3, 3), 3),  # more than 128 rows, and not a multiple of 128
    ],
    ids=str,
)
def test_shapes(backend, form, student, teacher, k):
    student, teacher = torch.randn(student), torch.randn(teacher)
    for weights in ((1, 1, 1), (0.3, 0.7, 2.5)):
        agree(student, teacher, k, weights=weights, backend=backend, form=form)


@every_form
@pytest.mark.parametrize(
    "weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 2, 2), (1, 0, 1), (-1, 3, 0.5)], ids=str
)
def test_weights(backend, form, weights):
    agree(relu_maps(4, 5, 6, 6), relu_maps(4, 3, 3, 3), 3, weights=weights, backend=backend, form=form)


@every_form
@pytest.mark.parametrize("weights", [(0, 0, 0), (0, 0, 1)])
def test_no_pairs_to_compare(backend, form, weights):
    """A loss of 0 still has a gradient, because ablations set weights to 0, and a last batch may have one image."""
    for reduction in ("batchmean", "sum", "mean"):
        settings = {"weights": weights, "reduction": reduction, "backend": backend, "form": form}
        loss, gradients = compute(torch.randn(1, 2, 4, 4), torch.randn(1, 3, 4, 4), 2, **settings)
        assert abs(loss) < 1e-5
        assert all(gradient.abs().max() < 1e-5 for gradient in gradients)


@every_form
def test_one_patch_in_all(backend, form):
    loss, gradients = compute(torch.randn(1, 3, 4, 4), torch.randn(1, 2, 5, 5), 1, backend=backend, form=form)
    assert abs(loss) < 1e-5
    assert all(gradient.abs().max() < 1e-5 for gradient in gradients)


@every_form
def test_one_number_a_patch(backend, form):
    """Cosines are ±1 for any size, so the loss counts signs, and its gradient is 0."""
    student, teacher = torch.randn(4, 1, 2, 2), torch.randn(4, 1, 2, 2)
    loss, gradients = compute(student, teacher, 2, backend=backend, form=form)
    assert_close(loss, oracle.local_correlation_loss(student, teacher, 2)[0])
    for value, gradient in zip((student, teacher), gradients, strict=True):
        assert (gradient * value).abs().max() < 1e-4


@every_form
def test_images_that_share_memory(backend, form):
    """With stride 0 over the batch, all images are equal, and so are their gradients."""
    student, teacher = torch.randn(1, 3, 4, 4).expand(5, -1, -1, -1), torch.randn(5, 3, 4, 4)
    agree(student, teacher, 2, backend=backend, form=form)


# Precision ------------------------------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_half_precision(backend, form, dtype):
    """The error is at most twice the error of eager code on the same inputs cast to float32."""
    student, teacher = torch.randn(6, 5, 6, 6).to(dtype), torch.randn(6, 4, 9, 3).to(dtype)
    loss, gradients = compute(student, teacher, 3, backend=backend, form=form)
    leaves = [x.clone().requires_grad_() for x in (student, teacher)]
    eager_loss, eager = loss_and_gradients(lambda s, t: oracle.eager(s.float(), t.float(), 3), *leaves)
    exact_loss, exact = oracle.local_correlation_loss(student, teacher, 3)
    assert loss.dtype == torch.float32
    assert_as_good_as(loss, eager_loss, exact_loss, "loss")
    for gradient, of_eager, of_exact in zip(gradients, eager, exact, strict=True):
        assert gradient.dtype == dtype
        assert_as_good_as(gradient, of_eager, of_exact, "gradient")


@every_form
def test_stages_of_different_dtypes(backend, form):
    student = [torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4).double()]
    teacher = [torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)]
    agree(student, teacher, 2, backend=backend, form=form)


@every_form
@pytest.mark.parametrize(("distance", "limit"), [(1e-3, 1e-5), (1e-5, 1e-4)])
def test_nearly_perfect_student(backend, form, distance, limit):
    """The three norms of the feature form cancel. The gradient stays accurate even if the loss is small."""
    n, k = 24, 2
    teacher = torch.randn(n, 16, 4, 4)
    noise, pairs = torch.randn(n, 16, 4, 4), k**4  # pairs of patches per pair of images
    low, high = 0.0, 2.0
    for _ in range(30):
        middle = (low + high) / 2
        below = oracle.eager(teacher.double() + middle * noise, teacher.double(), k) < distance * pairs
        low, high = (middle, high) if below else (low, middle)
    student = teacher + low * noise
    loss, gradients = compute(student, teacher, k, backend=backend, form=form)
    exact = [x.double().requires_grad_() for x in (student, teacher)]
    exact_loss, exact_gradients = loss_and_gradients(lambda s, t: oracle.eager(s, t, k), *exact)
    assert 0.5 * distance < exact_loss / pairs < 2 * distance
    assert relative_error(loss, exact_loss) < 10 * limit
    for gradient, of_exact in zip(gradients, exact_gradients, strict=True):
        assert relative_error(gradient, of_exact) < limit


@every_form
def test_a_perfect_student(backend, form):
    """With equal maps, and with scaled and rotated maps, all cosines are equal."""
    teacher = relu_maps(6, 8, 4, 4)
    turn = torch.linalg.qr(torch.randn(8, 8))[0]
    for student in (teacher, 3 * teacher, torch.einsum("ab,nbhw->nahw", turn, teacher)):
        loss, (of_student, _) = compute(student, teacher, 2, backend=backend, form=form)
        assert abs(loss) < 1e-5
        assert (of_student * student).abs().max() < 1e-3


def test_the_same_tensor_for_both(backend):
    maps = torch.randn(3, 4, 4, 4, requires_grad=True)
    local_correlation_loss(maps, maps, 2, backend=backend).backward()
    assert maps.grad.abs().max() < 1e-5


# Dead, huge and broken patches ----------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("who", ["student", "teacher", "both", "one image", "all of student", "all"])
def test_dead_patches(backend, form, who):
    student, teacher = relu_maps(5, 4, 6, 6), relu_maps(5, 3, 6, 6)
    dead = torch.rand(5, 1, 3, 1, 3, 1) < 0.3
    dead[0, :, 0, :, 0] = True
    if who == "one image":
        student[1] = teacher[1] = 0
    elif who == "all of student":
        student.zero_()
    elif who == "all":
        student.zero_(), teacher.zero_()
    for maps, named in ((student, "student"), (teacher, "teacher")):
        if who in (named, "both"):
            maps.view(5, -1, 3, 2, 3, 2).masked_fill_(dead, 0)
    for weights in ((1, 1, 1), (0.2, 3, 1)):
        agree(student, teacher, 3, weights=weights, backend=backend, form=form)


@every_form
@pytest.mark.parametrize(("images", "k"), [(1, 3), (5, 1)], ids=["one image", "one position"])
def test_dead_patches_where_an_equation_has_all_pairs(backend, form, images, k):
    """If only one patch is zero, the diagonal differs. It belongs to Eq. 4 and to Eq. 5."""
    student, teacher = torch.randn(images, 3, 6, 6), torch.randn(images, 2, 3, 3)
    student[0, :, : 6 // k, : 6 // k] = 0
    agree(student, teacher, k, weights=(1, 0.5, 2), backend=backend, form=form)


@every_form
def test_one_patch_alone_that_is_dead_in_one_network(backend, form):
    student, teacher = torch.zeros(1, 3, 6, 6), torch.randn(1, 2, 3, 3)
    loss = local_correlation_loss(student, teacher, 1, weights=(1, 0.5, 2), backend=backend, form=form)
    assert_close(loss, torch.tensor(1.5))


def test_costs_are_those_of_the_resized_maps():
    costs = []
    for size, partition in ((7, "resize"), (9, "exact")):
        maps = torch.randn(4, 3, size, size)
        told = explain("local_correlation_loss", maps, maps, 3, partition=partition, backend="reference")
        costs.append([part.costs for parts in told.stages for part in parts])
    assert costs[0] == costs[1]


@every_form
def test_eps(backend, form):
    """A norm of at most eps counts as zero. A norm just above eps has a direction."""
    student, teacher = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    student /= student.norm(dim=1, keepdim=True)
    student[0, :, 0, 0] *= 0.99e-3
    student[1, :, 0, 1] *= 1.01e-3
    agree(student, teacher, 2, eps=1e-3, backend=backend, form=form)
    agree(student, teacher, 2, eps=0, backend=backend, form=form)
    agree(student, teacher, 2, eps=2e-3, backend=backend, form=form)


@every_form
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e18, 1e36])
def test_cosines_do_not_depend_on_size(backend, form, scale):
    """The squares exceed the range of float32, but the features do not."""
    student, teacher = torch.randn(3, 130, 4, 4), torch.randn(3, 4, 2, 2)
    student[1] *= 1e-3
    agree(scale * student, teacher, 2, eps=0, backend=backend, form=form)
    agree(student, scale * teacher, 2, eps=0, backend=backend, form=form)


@every_form
def test_huge_bfloat16(backend, form):
    student, teacher = (1e18 * torch.randn(3, 130, 4, 4)).bfloat16(), torch.randn(3, 4, 2, 2)
    loss, _ = compute(student, teacher, 2, backend=backend, form=form)
    assert_close(loss, oracle.local_correlation_loss(student, teacher, 2)[0])


@every_form
def test_tiny_patches_are_dead(backend, form):
    student, teacher = torch.randn(3, 4, 4, 4), torch.randn(3, 4, 2, 2)
    student[1] *= 1e-12
    agree(student, teacher, 2, backend=backend, form=form)
    student *= 1e-30
    agree(student, teacher, 2, backend=backend, form=form)


def test_nan_counts_where_no_pair_does(backend):
    student, teacher = torch.randn(2, 1, 3, 4, 4)
    student[0, 1, 2, 3] = torch.nan
    assert local_correlation_loss(student, teacher, 1, weights=(0, 0, 1), backend=backend).isnan()


@pytest.mark.parametrize("place", [0, 1])
def test_one_stage_in_float64(backend, place):
    student, teacher = ([torch.randn(3, 2, 4, 4), torch.randn(3, 3, 4, 4)] for _ in range(2))
    student[place] = student[place].double()
    agree(student, teacher, 2, backend=backend)


@every_form
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_a_number_comes_out(backend, form, value, dtype):
    for broken in (0, 1):
        maps = [torch.randn(4, 3, 4, 4).to(dtype), torch.randn(4, 5, 6, 2).to(dtype)]
        maps[broken][2, 1, 1, 1] = value
        for weights in ((1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
            loss, gradients = compute(*maps, 2, weights=weights, backend=backend, form=form)
            assert loss.isnan()
            assert gradients[broken][2].isnan().any()
        for reduction in ("sum", "mean"):
            loss, gradients = compute(*maps, 2, reduction=reduction, backend=backend, form=form)
            assert all(gradient.isnan().all() for gradient in gradients)


# Mask, threshold, crop ------------------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("student", [(6, 6), (12, 6), (4, 10), (2, 2)], ids=str)
@pytest.mark.parametrize("threshold", [None, 0.3, 0.9])
def test_mask(backend, form, student, threshold):
    student, teacher = torch.randn(4, 3, *student), torch.randn(4, 5, 6, 6)
    mask = torch.rand(4, 6, 6) * (torch.rand(4, 6, 1) < 0.7) * (torch.rand(4, 1, 6) < 0.5)
    mask[0] = 0.1  # does not exceed the threshold
    settings = {"mask": mask, "threshold": threshold, "backend": backend, "form": form}
    agree(student, teacher, 2, **settings)


@every_form
@pytest.mark.parametrize("sides", [(7, 7), (7, 5), (6, 7)], ids=str)
def test_mask_and_resize(backend, form, sides):
    student, teacher = torch.randn(3, 4, *sides), torch.randn(3, 5, 7, 8)
    agree(student, teacher, 3, partition="resize", backend=backend, form=form)
    mask = torch.rand(3, 7, 8)
    agree(student, teacher, 3, partition="resize", mask=mask, backend=backend, form=form)
    settings = {"partition": "resize", "mask": mask, "threshold": 0.8, "backend": backend, "form": form}
    agree(student, teacher, 3, **settings)


def test_resize_changes_nothing_where_k_divides(backend):
    student, teacher = torch.randn(3, 4, 6, 9), torch.randn(3, 5, 3, 12)
    exact, resized = (
        local_correlation_loss(student, teacher, 3, partition=how, backend=backend) for how in ("exact", "resize")
    )
    assert_close(resized, exact)


@pytest.mark.parametrize("corner", [(0, 0), (0, 5), (5, 0), (5, 5), (2, 3)], ids=str)
def test_a_box_of_one_pixel(backend, corner):
    student, teacher = torch.randn(3, 4, 6, 6), torch.randn(3, 5, 6, 6)
    mask = torch.full((3, 6, 6), 0.4)
    mask[(slice(None), *corner)] = 0.9
    agree(student, teacher, 3, mask=mask, threshold=0.5, backend=backend)


@pytest.mark.parametrize("level", [0.5, 0.2])
def test_a_mask_that_nowhere_exceeds_the_threshold(backend, level):
    """The box is the whole map, as without a threshold, because the comparison is strict."""
    student, teacher, mask = torch.randn(3, 4, 4, 4), torch.randn(3, 5, 4, 4), torch.full((3, 4, 4), level)
    agree(student, teacher, 2, mask=mask, threshold=0.5, backend=backend)
    cropped, whole = (
        local_correlation_loss(student, teacher, 2, mask=mask, threshold=t, backend=backend) for t in (0.5, None)
    )
    assert_close(cropped, whole)


def test_a_mask_of_zeros_leaves_nothing(backend):
    student, teacher = torch.randn(3, 4, 4, 4), torch.randn(3, 5, 4, 4)
    for threshold in (None, 0.5):
        settings = {"mask": torch.zeros(3, 4, 4), "threshold": threshold, "backend": backend}
        loss, gradients = compute(student, teacher, 2, **settings)
        assert loss == 0
        assert all(gradient.eq(0).all() for gradient in gradients)


def test_mask_shapes_and_strides(backend):
    student, teacher, mask = torch.randn(3, 4, 4, 6), torch.randn(3, 5, 4, 6), torch.rand(3, 4, 6)
    settings = {"threshold": 0.6, "backend": backend}
    for same in (mask[:, None], mask.transpose(1, 2).contiguous().transpose(1, 2), torch.rand(3, 1, 1).expand(3, 4, 6)):
        agree(student, teacher, 2, mask=same, **settings)
    agree([student, student], [teacher, teacher], 2, mask=[mask, torch.rand(3, 4, 6)], **settings)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_dtypes(backend, dtype):
    """The box belongs to the mask in its own dtype, for any dtype of the features."""
    mask = torch.rand(3, 4, 4).to(dtype)
    if dtype == torch.float64:
        mask[:, 0] = 0.75 + 1e-12
    for of_student, of_teacher in ((torch.float32, torch.float32), (torch.float32, torch.float64)):
        student, teacher = torch.randn(3, 4, 4, 4, dtype=of_student), torch.randn(3, 5, 4, 4, dtype=of_teacher)
        agree(student, teacher, 2, mask=mask, threshold=0.75, backend=backend)


def test_no_gradient_to_the_mask(backend):
    mask = torch.rand(3, 4, 4, requires_grad=True)
    student = torch.randn(3, 4, 4, 4, requires_grad=True)
    local_correlation_loss(student, torch.randn(3, 5, 4, 4), 2, mask=mask, threshold=0.5, backend=backend).backward()
    assert mask.grad is None
    assert student.grad is not None
    nothing = local_correlation_loss(student.detach(), torch.randn(3, 5, 4, 4), 2, mask=mask, backend=backend)
    assert not nothing.requires_grad


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_not_a_number_in_the_mask(backend, threshold):
    student, teacher, mask = torch.randn(3, 4, 4, 4), torch.randn(3, 5, 4, 4), torch.rand(3, 4, 4)
    mask[1, 3, 0] = float("nan")
    loss, _ = compute(student, teacher, 2, mask=mask, threshold=threshold, backend=backend)
    assert loss.isnan()


# Contracts ------------------------------------------------------------------------------------------------------------


def test_a_stage_without_gradient(backend):
    student = [torch.randn(3, 2, 4, 4), torch.randn(3, 4, 2, 2, requires_grad=True)]
    teacher = [torch.randn(3, 2, 4, 4, requires_grad=True), torch.randn(3, 4, 2, 2)]
    _, exact = oracle.local_correlation_loss(student, teacher, 2)
    local_correlation_loss(student, teacher, 2, backend=backend).backward()
    assert student[0].grad is None
    assert teacher[1].grad is None
    assert_close(student[1].grad, exact[1])
    assert_close(teacher[0].grad, exact[2])


@every_form
def test_second_derivative_at_dead_patches(backend, form):
    student, teacher = torch.randn(3, 3, 4, 4).double(), torch.randn(3, 2, 4, 4).double()
    student[0, :, :2, :2] = 0
    student.requires_grad_()
    loss = local_correlation_loss(student, teacher, 2, backend=backend, form=form)
    (first,) = torch.autograd.grad(loss, student, create_graph=True)
    try:
        first.square().sum().backward()
    except RuntimeError:
        return
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("relation", ["full", "intra", "inter_same", "inter_diff"])
def test_autocast_changes_no_correlation(backend, relation):
    features = torch.randn(3, 4, 4, 4)
    outside = local_correlation(features, 2, relation, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        inside = local_correlation(features, 2, relation, backend=backend)
    assert inside.dtype == torch.float32
    assert_close(inside, outside)


@every_form
@pytest.mark.parametrize("settings", [{}, {"threshold": 0.5, "partition": "resize"}], ids=["plain", "masked"])
def test_compiled_for_any_batch(backend, form, settings):
    def loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        own = {**settings, "mask": mask} if settings else {}
        return 2 * local_correlation_loss(torch.tanh(student), teacher, 2, backend=backend, form=form, **own)

    if backend == "reference":
        pytest.skip("PyTorch's own operators; minutes of symbolic shapes")
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (4, 7):
        student, teacher = torch.randn(n, 3, 4, 6, requires_grad=True), torch.randn(n, 5, 6, 6, requires_grad=True)
        mask = torch.rand(n, 6, 6)
        eager, gradients = loss_and_gradients(lambda s, t: loss(s, t, mask), student, teacher)  # noqa: B023
        result, of_compiled = loss_and_gradients(lambda s, t: compiled(s, t, mask), student, teacher)  # noqa: B023
        assert_close(result, eager)
        for a, b in zip(of_compiled, gradients, strict=True):
            assert_close(a, b)


# The paper's order: split, then resize -----------------------------------------------------------------------------


def patches_by_hand(maps: Tensor, k: int, mask: Tensor | None = None, threshold: float | None = None) -> Tensor:
    """Cut the box of every image with slices, resize each patch separately, and put the patches side by side."""
    height, width = (-(-side // k) for side in maps.shape[2:])
    images = []
    for index, image in enumerate(maps.double()):
        top, left, bottom, right = 0, 0, *maps.shape[2:]
        if mask is not None:
            image = image * mask[index].double()
            rows, columns = ((mask[index] > threshold).any(dim).nonzero().flatten().tolist() for dim in (1, 0))
            top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        grid = []
        for p in range(k):
            line = []
            for q in range(k):
                a, c = top + (bottom - top) * p // k, left + (right - left) * q // k
                b, d = top + (bottom - top) * (p + 1) // k, left + (right - left) * (q + 1) // k
                patch = image[None, :, a : max(b, a + 1), c : max(d, c + 1)]
                line.append(torch.nn.functional.interpolate(patch, (height, width), mode="bilinear")[0])
            grid.append(torch.cat(line, 2))
        images.append(torch.cat(grid, 1))
    return torch.stack(images)


@every_form
@pytest.mark.parametrize("masked", [False, True])
def test_patches_that_are_split_before_they_are_resized(backend, form, masked):
    student, teacher = torch.randn(5, 3, 7, 8), torch.randn(5, 2, 7, 8)
    settings = {"weights": (0.5, 2.0, 1.5)}
    by_hand = [patches_by_hand(maps, 3) for maps in (student, teacher)]
    if masked:
        mask = torch.full((5, 7, 8), 0.25)
        for index, (top, bottom, left, right) in enumerate([(1, 5, 2, 3), (0, 7, 0, 8), (6, 7, 1, 8), (2, 4, 3, 5)]):
            mask[index, top:bottom, left:right] = 0.75 + 0.2 * torch.rand(bottom - top, right - left)
        mask[4, 3, 3] = 0.8
        settings |= {"mask": mask, "threshold": 0.5}
        by_hand = [patches_by_hand(maps, 3, mask, 0.5) for maps in (student, teacher)]
    exact, _ = oracle.local_correlation_loss(*by_hand, 3, weights=(0.5, 2.0, 1.5))
    loss, gradients = compute(student, teacher, 3, backend=backend, form=form, partition="split", **settings)
    assert_close(loss, exact)
    leaves = [maps.double().requires_grad_() for maps in (student, teacher)]
    cut = [patches_by_hand(leaf, 3, settings.get("mask"), 0.5) for leaf in leaves]
    local_correlation_loss(*cut, 3, weights=(0.5, 2.0, 1.5), backend="reference").backward()
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert_close(gradient, leaf.grad)


def test_a_map_that_k_divides_is_split_as_it_is(backend):
    student, teacher = torch.randn(4, 3, 6, 9), torch.randn(4, 5, 3, 6)
    exact, split = (
        compute(student, teacher, 3, partition=partition, backend=backend) for partition in ("exact", "split")
    )
    assert torch.equal(exact[0], split[0])
    for a, b in zip(exact[1], split[1], strict=True):
        assert_close(a, b)
    correlations = [local_correlation(teacher, 3, partition=partition) for partition in ("exact", "split")]
    assert torch.equal(*correlations)


def test_splitting_before_resizing_is_explained(backend):
    """The costs belong to the maps that are compared."""
    maps = [torch.randn(4, c, 7, 7) for c in (3, 5)]
    split, resize = (
        explain("local_correlation_loss", *maps, 3, partition=partition, backend=backend).stages
        for partition in ("split", "resize")
    )
    assert split == resize


# The matrices themselves ----------------------------------------------------------------------------------------------


def test_correlations(backend):
    n, k = 3, 2
    features = torch.randn(n, 4, 6, 2, requires_grad=True)
    features.data[1, :, :3, :1] = 0
    rows = torch.from_numpy(oracle.Patches(oracle.array(features), k).unit)
    full = (rows @ rows.T).view(n, k * k, n, k * k)
    relations = {
        name: local_correlation(features, k, name, backend=backend)
        for name in ("full", "intra", "inter_same", "inter_diff")
    }
    assert_close(relations["full"], full.reshape(n * k * k, n * k * k))
    assert_close(relations["intra"], torch.stack([full[i, :, i] for i in range(n)]))
    assert_close(relations["inter_same"], torch.stack([full[:, p, :, p] for p in range(k * k)]))
    others = full.clone()
    for i in range(n):
        others[i, :, i] = 0
    for p in range(k * k):
        others[:, p, :, p] = 0
    assert_close(relations["inter_diff"], others.reshape(n * k * k, n * k * k))
    relations["full"].square().sum().backward()
    assert_close(
        features.grad,
        torch.from_numpy(oracle.Patches(oracle.array(features), k).gradient((4 * (rows @ rows.T) @ rows).numpy())),
    )


# Misuse ---------------------------------------------------------------------------------------------------------------


def call(**changes):
    arguments = {"student": torch.randn(4, 3, 6, 6), "teacher": torch.randn(4, 5, 6, 6), "k": 3, **changes}
    return local_correlation_loss(arguments.pop("student"), arguments.pop("teacher"), arguments.pop("k"), **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"teacher": torch.randn(5, 5, 6, 6)}, ValueError, ["teacher", "batch", "4", "5"]),
        ({"student": torch.randn(4, 3, 7, 6)}, ValueError, ["student", "k=3", "7", 'partition="resize"']),
        ({"teacher": torch.randn(4, 3, 6, 8)}, ValueError, ["teacher", "k=3", "8", 'partition="resize"']),
        ({"student": torch.randn(4, 3, 2, 2), "teacher": torch.randn(4, 3, 2, 2)}, ValueError, ["student", "k=3", "2"]),
        (
            {"student": torch.randn(0, 3, 6, 6), "teacher": torch.randn(0, 5, 6, 6)},
            ValueError,
            ["student", "empty", "0"],
        ),
        ({"student": torch.randn(4, 0, 6, 6)}, ValueError, ["student", "empty", "0"]),
        ({"student": torch.ones(4, 3, 6, 6, dtype=torch.int64)}, TypeError, ["student", "float32", "int64"]),
        ({"teacher": torch.ones(4, 3, 6, 6, dtype=torch.bool)}, TypeError, ["teacher", "float32", "bool"]),
        ({"student": torch.ones(4, 3, 6, 6, dtype=torch.complex64)}, TypeError, ["student", "float32", "complex64"]),
        ({"student": torch.randn(4, 3, 36)}, ValueError, ["student", "n x c x h x w", "(4, 3, 36)"]),
        ({"student": "features"}, TypeError, ["student", "tensor", "str"]),
        ({"student": None}, TypeError, ["student", "tensor", "NoneType"]),
        ({"teacher": torch.randn(4, 5, 6, 6, device="meta")}, ValueError, ["teacher", "meta", "cpu"]),
        ({"student": [], "teacher": []}, ValueError, ["student", "at least one", "empty"]),
        ({"student": [torch.randn(4, 3, 6, 6)] * 2}, ValueError, ["teacher", "2", "1"]),
        (
            {"student": [torch.randn(4, 3, 6, 6)] * 2, "teacher": [torch.randn(4, 3, 6, 6), torch.randn(3, 3, 6, 6)]},
            ValueError,
            ["teacher[1]", "batch", "4", "3"],
        ),
        (
            {
                "student": [torch.randn(4, 3, 6, 6), torch.randn(3, 3, 6, 6)],
                "teacher": [torch.randn(4, 3, 6, 6), torch.randn(3, 3, 6, 6)],
            },
            ValueError,
            ["student[1]", "student[0]", "batch", "4", "3"],
        ),
        ({"k": [3, 3]}, ValueError, ["k", "1", "2"]),
        ({"k": 0}, ValueError, ["k", "positive integer", "0"]),
        ({"k": -3}, ValueError, ["k", "positive integer", "-3"]),
        ({"k": 3.0}, (TypeError, ValueError), ["k", "integer", "3.0"]),
        ({"k": True}, ValueError, ["k", "positive integer", "True"]),
        ({"k": "2"}, ValueError, ["k", "positive integer", "'2'"]),
        ({"k": None}, (TypeError, ValueError), ["k", "integer", "None"]),
        ({"weights": (1, 1)}, ValueError, ["weights", "three", "(1, 1)"]),
        ({"weights": (1, 1, 1, 1)}, ValueError, ["weights", "three", "(1, 1, 1, 1)"]),
        ({"weights": 1.0}, (TypeError, ValueError), ["weights", "three", "1.0"]),
        ({"weights": (1, float("nan"), 1)}, ValueError, ["weights", "nan"]),
        ({"weights": (1, float("inf"), 1)}, ValueError, ["weights", "inf"]),
        ({"mask": torch.rand(4, 5, 6)}, ValueError, ["mask", "teacher", "(6, 6)", "(5, 6)"]),
        ({"mask": torch.rand(3, 6, 6)}, ValueError, ["mask", "batch", "4", "3"]),
        ({"mask": torch.rand(6, 6)}, ValueError, ["mask", "n x h x w", "(6, 6)"]),
        ({"mask": torch.rand(4, 2, 6, 6)}, ValueError, ["mask", "n x 1 x h x w", "(4, 2, 6, 6)"]),
        ({"mask": torch.rand(4, 6, 6) > 0.5}, TypeError, ["mask", "float32", "bool"]),
        ({"mask": torch.rand(4, 6, 6, device="meta")}, ValueError, ["mask", "meta", "cpu"]),
        ({"mask": [torch.rand(4, 6, 6)] * 2}, ValueError, ["mask", "1", "2"]),
        (
            {
                "student": [torch.randn(4, 3, 6, 6)] * 2,
                "teacher": [torch.randn(4, 3, 6, 6)] * 2,
                "mask": [None, torch.rand(4, 6, 6)],
            },
            TypeError,
            ["mask", "every stage", "None"],
        ),
        ({"threshold": 0.5}, ValueError, ["threshold", "0.5", "mask"]),
        ({"threshold": "0.5", "mask": torch.rand(4, 6, 6)}, (TypeError, ValueError), ["threshold", "number", "'0.5'"]),
        ({"threshold": float("nan"), "mask": torch.rand(4, 6, 6)}, ValueError, ["threshold", "nan"]),
        ({"eps": -1e-8}, ValueError, ["eps", "-1e-08"]),
        ({"eps": float("nan")}, ValueError, ["eps", "nan"]),
        ({"form": "grams"}, ValueError, ["form", "gram", "feature", "'grams'"]),
        ({"backend": "cuda"}, ValueError, ["backend", "native", "triton", "'cuda'"]),
        ({"reduction": "none"}, ValueError, ["reduction", "batchmean", "sum", "mean", "'none'"]),
        ({"partition": "pad"}, ValueError, ["partition", "exact", "resize", "split", "'pad'"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_misuse(changes, error, words):
    """Every error names the argument, what it got and what was expected."""
    with pytest.raises(error) as raised:
        call(**changes)
    for word in words:
        assert word in str(raised.value), f"{word!r} is missing in: {raised.value}"


def test_misuse_of_correlation():
    features = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match=re.compile("relation.*intra.*'inter'")):
        local_correlation(features, 2, "inter")
    with pytest.raises(ValueError, match='partition="resize"'):
        local_correlation(features, 3)


def test_something_else_than_a_group_is_refused():
    with pytest.raises(TypeError, match=r"group must be .* process group"):
        call(group=object())
