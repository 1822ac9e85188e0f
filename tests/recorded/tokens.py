"""Records what other trainers' token losses compute: ``python tests/recorded/tokens.py FOLDER`` writes ``tokens.npz``.

FOLDER holds these files of the hosts; the numbers that lie here come from these commits:

- gram_loss.py: github.com/facebookresearch/dinov3, dinov3/loss, 6876159
- distillationv3_loss.py: github.com/lightly-ai/lightly-train, src/lightly_train/_methods/distillationv3, 8f5a75c
- loss.py: github.com/mlfoundations/open_clip, src/open_clip, 89fb801
- contperceptual.py: github.com/hustvl/LightningDiT, vavae/ldm/modules/losses, 2725fed
- lora_trainer.py: github.com/aHapBean/VideoREPA, finetune/models/cogvideox_t2v_align, 8002687

The first three are imported. The last two need a whole trainer, so only the statements of the loss run. Features are
random float16 numbers, exact in every precision. DINOv3 computes in float32, the others here in float64.
"""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape).half().double().requires_grad_()


def statements(source: str, condition: str, first: str) -> ast.Module:
    """Return the statements under the ``if`` with this condition, from the first one that contains ``first`` on."""
    tests = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.If))
    for body in (node.body for node in tests if condition in ast.unparse(node.test)):
        for i, statement in enumerate(body):
            if first in ast.unparse(statement):
                return ast.Module(body[i:], [])
    raise ValueError(f"no statement under {condition} contains {first}")


def recorded(folder: Path) -> dict[str, Tensor]:
    sys.path.insert(0, str(folder))
    torch.manual_seed(0)
    results: dict[str, Tensor] = {}

    def record(name: str, losses: Tensor | tuple[Tensor, ...], *inputs: Tensor) -> None:
        """Keep the inputs, the losses, and the gradient of 1·first loss + 2·second loss to each input."""
        each = losses if isinstance(losses, tuple) else (losses,)
        total = sum(weight * loss for weight, loss in enumerate(each, 1))
        gradients = torch.autograd.grad(total, inputs)
        results.update({f"{name} input {i}": x.half() for i, x in enumerate(inputs)})
        results.update({f"{name} loss {i}": loss for i, loss in enumerate(each)})
        results.update({f"{name} gradient {i}": gradient for i, gradient in enumerate(gradients)})

    GramLoss = importlib.import_module("gram_loss").GramLoss
    for name, settings in (("gram", {}), ("gram teacher", {"remove_neg": False, "remove_only_teacher_neg": True})):
        student, teacher = leaf(2, 9, 5), leaf(2, 9, 7)
        for level in (True, False):
            where = name if level else f"{name} batch"
            record(where, GramLoss(**settings)(student, teacher, img_level=level), student, teacher)
    student, teacher = leaf(2, 9, 5), leaf(2, 9, 7)
    raw = GramLoss(apply_norm=False, remove_neg=False)
    record("gram raw", raw(student, teacher), student, teacher)

    loss = importlib.import_module("distillationv3_loss").DistillationV3Loss(0.07, 0.1)
    inputs = [leaf(3, 6), leaf(3, 8, 6), leaf(3, 6), leaf(3, 8, 6), leaf(10, 6)]
    record("lightly", loss(*(F.normalize(x, dim=-1) for x in inputs)), *inputs)

    loss = importlib.import_module("loss").DistillClipLoss()
    inputs = [leaf(7, 6), leaf(7, 6), leaf(7, 9), leaf(7, 9)]
    images, texts, their_images, their_texts = (F.normalize(x, dim=-1) for x in inputs)
    scale = torch.tensor(9.5, dtype=torch.float64, requires_grad=True)
    record("clip", loss(images, texts, scale, their_images, their_texts, 14.0), *inputs, scale)

    z, features = leaf(2, 6, 3, 4), leaf(2, 6, 3, 4)
    margins = SimpleNamespace(distmat_margin=0.25, cos_margin=0.5, distmat_weight=1.5, cos_weight=0.5)

    def rearrange(x: Tensor, _: str) -> Tensor:
        return x.flatten(2)  # the only pattern that the statements use

    names = {"z": z, "aux_feature": features, "self": margins, "torch": torch, "rearrange": rearrange}
    source = (folder / "contperceptual.py").read_text()
    body = statements(source, "z is not None and aux_feature is not None", "z_flat")
    exec(compile(body, "contperceptual", "exec"), names)
    record("vf", names["vf_loss"], z, features)

    align, target = leaf(2, 3, 4, 6), leaf(2, 3, 4, 6)
    source = (folder / "lora_trainer.py").read_text()
    everywhere = "token_relation_distillation"
    for name, kind in (("trd", everywhere), ("trd spatial", f"{everywhere}_only_spatial")):
        given = SimpleNamespace(args=SimpleNamespace(margin=0.1, margin_matrix=0.1, align_dims=[6]))
        names = {"align": align, "align_target": target, "self": given, "torch": torch, "nn": nn, "F": 3}
        body = statements(source, f"self.args.loss == '{kind}'", "normalize(align,")
        exec(compile(body, "lora_trainer", "exec"), names)
        record(name, names["token_relation_distillation_loss"], align, target)
    return results


if __name__ == "__main__":
    arrays = {name: value.detach().numpy() for name, value in recorded(Path(sys.argv[1])).items()}
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **arrays)
