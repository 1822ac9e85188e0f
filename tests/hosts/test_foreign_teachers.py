"""Teachers of timm and torchvision in the examples: their stages, and their checkpoints in our networks."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import hosts
import pytest
import torch

hosts.make_torchvision_importable()
timm = pytest.importorskip("timm", reason="timm is not installed: make test-hosts")
models = pytest.importorskip("torchvision").models
for package in ("matplotlib", "scipy", "sklearn", "tqdm"):
    pytest.importorskip(package)
sys.path[:0] = [str(Path(__file__).parents[2] / "examples")]

import train_lkd  # noqa: E402
from common import networks, training  # noqa: E402


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("timm:resnet18", (64, 128, 256, 512)),
        ("timm:convnext_atto", (40, 80, 160, 320)),
        ("timm:densenet121", (128, 256, 512, 1024)),
        ("torchvision:resnet18", (64, 128, 256, 512)),
        ("torchvision:mobilenet_v2", (24, 32, 96, 1280)),
    ],
)
def test_stages_are_the_last_maps_of_each_size(name, channels):
    network = networks.build(name, 3, 10, 64)
    network = pickle.loads(pickle.dumps(network)).eval()
    logits, stages = network(torch.randn(2, 3, 64, 64))
    assert network.channels == channels == tuple(stage.shape[1] for stage in stages)
    sides = [stage.shape[2] for stage in stages]
    assert sides == [16, 8, 4, 2]
    assert logits.shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:vit_tiny_patch16_224", "its maps of shape .* have fewer than two sizes"),
        ("timm:no_such_model", "Unknown model"),
        ("torchvision:no_such_model", "Unknown model"),
        ("torchvision:densenet121", ".* overwritten in place"),
    ],
)
def test_a_network_that_cannot_be_a_teacher(name, message):
    with pytest.raises(ValueError, match=f"{name} cannot be built for images of 224 x 224: {message}"):
        networks.build(name, 3, 10, 224)


@pytest.mark.parametrize(
    ("make", "own"),
    [
        (lambda: timm.create_model("resnet18", num_classes=7), "resnet18-224"),
        (lambda: models.resnet34(num_classes=7), "resnet34-224"),
        (lambda: models.resnet50(num_classes=7), "resnet50-224"),
    ],
)
def test_their_checkpoints_fit_the_networks_of_the_examples(make, own, tmp_path):
    theirs, ours = make(), networks.build(own, 3, 7)
    theirs(torch.randn(2, 3, 64, 64))  # moves the statistics of the batch norms
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    training.load_weights(ours, tmp_path / "weights.pth")
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours.eval()(images)[0], theirs.eval()(images))


def test_a_teacher_of_timm_from_its_file(tmp_path):
    theirs = timm.create_model("resnet10t", in_chans=1, num_classes=10)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    places = ["--out", str(tmp_path), "--teacher", "timm:resnet10t", "--teacher-weights", str(tmp_path / "weights.pth")]
    sizes = ["--epochs", "1", "--seeds", "2", "--jobs", "2", "--methods", "LKD", "--share", "0.1"]
    train_lkd.main([*places, *sizes])
    assert training.read(tmp_path / "checkpoints" / "lkd-seed1.pt")["history"][0]["lkd"] > 0
