"""Records what public code of the baselines computes: ``python tests/recorded/baselines.py CLONES`` writes
``baselines.npz``.

CLONES is a folder with clones of github.com/HobbitLong/RepDistiller (b84f547), DefangChen/SemCKD (ebe5db1),
DefangChen/SimKD (2b389c3), dvlab-research/ReviewKD (cede6ea) and KaiyuYue/mgd (910a636); the file that lies here comes
from these commits. Inputs and parameters are random float16 numbers, exact in every precision. From them each program
computes in float64 its results, and the gradients of inputs and parameters. Parameters lie one after the other. The
name of an array is ``method.array``.

mgd asks ortools to assign channels. Here scipy assigns them, from the same integer costs.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

Arrays = dict[str, Tensor]


def rounded(x: Tensor) -> Tensor:
    return x.detach().half().double().requires_grad_()


def draw(*shape: int) -> Tensor:
    return rounded(torch.randn(*shape))


def settle(module: nn.Module) -> list[nn.Parameter]:
    """Give the module parameters that float16 holds exactly."""
    parameters = list(module.parameters())
    for parameter in parameters:
        parameter.data = rounded(parameter + 0.1 * torch.randn_like(parameter)).data
    return parameters


def vector(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def with_gradients(loss: Tensor, inputs: Arrays, parameters: list[nn.Parameter] | None = None) -> Arrays:
    """Return inputs, parameters, loss, and the gradients that exist."""
    wanted = {name: x for name, x in inputs.items() if x.requires_grad}
    arrays = {name: x.half() if x.is_floating_point() else x for name, x in inputs.items()} | {"loss": loss}
    found = torch.autograd.grad(loss, [*wanted.values(), *(parameters or [])], allow_unused=True)
    arrays |= {f"{name}_gradient": x for name, x in zip(wanted, found, strict=False) if x is not None}
    if parameters:
        arrays |= {"parameters": vector(parameters).half(), "parameters_gradient": vector(found[len(wanted) :])}
    return arrays


def clone(path: Path, *names: str) -> list[types.ModuleType]:
    """Import modules of one clone. Clones have packages of the same names."""
    known = set(sys.modules)
    sys.path.insert(0, str(path))
    modules = [importlib.import_module(name) for name in names]
    sys.path.remove(str(path))
    for name in set(sys.modules) - known:
        if str(path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    return modules


def crd(clones: Path) -> Arrays:
    """Two calls: the first sets Z and moves the memory, which the second uses."""
    (criterion,) = clone(clones / "RepDistiller", "crd.criterion")
    opt = types.SimpleNamespace(s_dim=5, t_dim=7, feat_dim=6, n_data=20, nce_k=9, nce_t=0.07, nce_m=0.5)
    loss = criterion.CRDLoss(opt)
    parameters = settle(loss)
    memories = [loss.contrast.memory_v1, loss.contrast.memory_v2]
    for memory in memories:
        memory.copy_(memory.half())
    arrays = {"student_memory": memories[0].half(), "teacher_memory": memories[1].half()}
    for call in range(2):
        student, teacher, images = draw(4, 5), draw(4, 7), torch.randperm(20)[:4]
        negatives = torch.randint(20, (4, 9))
        value = loss(student, teacher, images, torch.cat([images[:, None], negatives], 1))
        inputs = {"student": student, "teacher": teacher, "images": images, "negatives": negatives}
        found = with_gradients(value.squeeze(), inputs, parameters)
        for name, array in found.items():
            base, mark, end = name.partition("_")
            arrays[f"{base}{call}{mark}{end}"] = array
    moved = {"student_memory_moved": memories[0], "teacher_memory_moved": memories[1]}
    return arrays | {name: memory.clone() for name, memory in moved.items()}


def vid(clones: Path) -> Arrays:
    (zoo,) = clone(clones / "RepDistiller", "distiller_zoo.VID")
    loss = zoo.VIDLoss(3, 4, 4)
    parameters = settle(loss)
    inputs = {"student": draw(2, 3, 6, 6), "teacher": draw(2, 4, 4, 4)}
    return with_gradients(loss(*inputs.values()), inputs, parameters)


def simkd(clones: Path) -> Arrays:
    (util,) = clone(clones / "SimKD", "models.util")
    module, classifier = util.SimKD(s_n=3, t_n=8, factor=2), nn.Linear(8, 5)
    parameters = settle(module)
    settle(classifier)
    inputs = {"student": draw(4, 3, 6, 6), "teacher": draw(4, 8, 4, 4)}
    projected, target, logits = module(*inputs.values(), classifier)
    arrays = with_gradients(nn.functional.mse_loss(projected, target), inputs, parameters)
    return arrays | {"classifier": vector(list(classifier.parameters())).half(), "logits": logits}


def reviewkd(clones: Path) -> Arrays:
    """Maps as in a small network, and pooled embeddings in the end."""
    (review,) = clone(clones / "ReviewKD" / "CIFAR-100", "model.reviewkd")
    nn.Module.to = lambda self, *_: self  # they call it with "cuda", GPU or not
    students = {f"student{i}": draw(3, c, side, side) for i, (c, side) in enumerate(((3, 8), (4, 4), (5, 2), (5, 1)))}
    teachers = {f"teacher{i}": draw(3, c, side, side) for i, (c, side) in enumerate(((4, 8), (6, 8), (7, 3), (7, 1)))}
    network = nn.Module()
    network.forward = lambda x, is_feat: (list(students.values()), None)
    module = review.ReviewKD(network, [3, 4, 5, 5], [4, 6, 7, 7], [1, 2, 4, 8], [1, 3, 8, 8])
    parameters = settle(module)
    results, _ = module(None)
    return with_gradients(review.hcl(results, list(teachers.values())), students | teachers, parameters)


def irg(clones: Path) -> Arrays:
    """Two pairs of layers. One pair changes its shape."""
    (zoo,) = clone(clones / "SemCKD", "distiller_zoo.IRG")
    inputs = {"student": draw(5, 4), "teacher": draw(5, 4)}
    layers = {
        f"{network}{i}": draw(5, *shape)
        for network, more in (("student", 0), ("teacher", 1))
        for i, shape in enumerate(((2 + more, 4, 4), (2 + more, 4, 4), (3, 2, 2), (4, 2 + more, 2)))
    }
    values = list(layers.values())
    arrays = with_gradients(zoo.IRGLoss()(*inputs.values(), values[:4], values[4:]), inputs | layers)
    wider = {"wide": draw(5, 6)}
    other = zoo.IRGLoss(w_graph=2.0, w_transform=3.0)(inputs["student"], wider["wide"], values[:2], values[4:6])
    return arrays | {"wide": wider["wide"].half(), "other_loss": other}


def hkd(clones: Path) -> Arrays:
    (zoo,) = clone(clones / "SemCKD", "distiller_zoo.HKD")
    kernels = {"student": "combined", "teacher": "combined", "loss": "combined"}
    inputs = {"student": draw(5, 2, 3, 3), "teacher": draw(5, 3, 2, 2)}
    student, teacher = (x.flatten(1) for x in inputs.values())
    return with_gradients(zoo.prob_loss(teacher, student, kernel_parameters=kernels), inputs)


class Assignment:
    """What mgd calls of ortools, by scipy."""

    OPTIMAL = 0

    def __init__(self) -> None:
        self.costs: dict[tuple[int, int], int] = {}

    def AddArcWithCost(self, row: int, column: int, cost: int) -> None:  # noqa: N802
        self.costs[row, column] = cost

    def Solve(self) -> int:  # noqa: N802
        rows, columns = (1 + max(axis) for axis in zip(*self.costs, strict=True))
        matrix = np.array([[self.costs[r, c] for c in range(columns)] for r in range(rows)])
        self.columns, self.matrix = linear_sum_assignment(matrix)[1], matrix
        return self.OPTIMAL

    def NumNodes(self) -> int:  # noqa: N802
        return len(self.columns)

    def RightMate(self, row: int) -> int:  # noqa: N802
        return int(self.columns[row])

    def AssignmentCost(self, row: int) -> int:  # noqa: N802
        return int(self.matrix[row, self.columns[row]])


def mgd(clones: Path) -> Arrays:
    """Two layers: with the teacher's channels twice the student's, and with equal channels."""
    solver = types.ModuleType("ortools.linear_solver.pywraplp"), types.ModuleType("ortools.graph.pywrapgraph")
    solver[1].LinearSumAssignment = Assignment
    for module in solver:
        package, name = module.__name__.rsplit(".", 1)
        sys.modules.setdefault("ortools", types.ModuleType("ortools"))
        sys.modules[package], sys.modules[module.__name__] = types.ModuleType(package), module
        setattr(sys.modules[package], name, module)
    (builder,) = clone(clones / "mgd", "mgd.builder")
    students, teachers = (3, 4), (6, 4)
    maps = {f"student{i}": draw(5, c, 3, 4) for i, c in enumerate(students)}
    maps |= {f"teacher{i}": draw(5, c, 3, 4) for i, c in enumerate(teachers)}

    def network(name: str, channels: tuple[int, ...]) -> nn.Module:
        net = nn.Module()
        layers = [x for key, x in maps.items() if key.startswith(name)]
        net.get_channel_num = lambda: channels
        net.extract_feature = lambda x, preReLU: (list(layers), None)
        net.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in channels)
        settle(net)
        net.get_bn_before_relu = lambda: list(net.norms)
        return net

    teacher = network("teacher", teachers)
    arrays: Arrays = {"norms": vector(list(teacher.parameters())).half()}
    for kind, reducer in ((builder.MGDistiller, "amp"), (builder.MGDistiller, "sp"), (builder.SMDistiller, "sm")):
        module = kind(teacher, network("student", students), reducer=reducer)
        parameters = settle(module.BNs)
        margins = [getattr(module, f"margin{i + 1}") for i in range(2)]
        arrays |= {f"margin{i}": margin.flatten().clone() for i, margin in enumerate(margins)}
        for margin in margins:  # float32, whose means they round
            margin.copy_(margin.half())
        module.extract_feature(None)
        module.update_flow()
        _, loss = module(None)
        found = with_gradients(loss, maps, parameters)
        found |= {f"assigned{i}": indices for i, indices in enumerate(module.guided_inds)}
        arrays |= {name if name in maps else f"{reducer}_{name}": array for name, array in found.items()}
    return arrays


def recorded(clones: Path) -> dict[str, np.ndarray]:
    Tensor.cuda = lambda self, *_: self  # they call it, GPU or not
    torch.set_default_dtype(torch.float64)
    arrays = {}
    for method in (crd, vid, simkd, reviewkd, irg, hkd, mgd):
        torch.manual_seed(0)
        arrays |= {f"{method.__name__}.{name}": x.detach().numpy() for name, x in method(clones).items()}
    return arrays


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **recorded(Path(sys.argv[1]).resolve()))
