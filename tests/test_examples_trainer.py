"""The trainer that the examples share: precision, accumulation, compilation, and the folder of a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

for package in ("matplotlib", "scipy", "sklearn", "tqdm"):
    pytest.importorskip(package)

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import train_cckd  # noqa: E402
import train_icct  # noqa: E402
import train_semckd  # noqa: E402
import train_tokens  # noqa: E402
from common import data, networks, options, photographs, training  # noqa: E402
from common.training import Engine  # noqa: E402
from example_runs import assert_same_checkpoints  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def same_settings() -> Iterator[None]:
    threads, precision, workers = torch.get_num_threads(), torch.get_float32_matmul_precision(), photographs.WORKERS
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    photographs.WORKERS = workers


class Stop(BaseException):
    pass


class Plain(nn.Module):
    """A network without batch norms. It keeps the dtype of its first map."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3), nn.Linear(4 * 14 * 14, 10)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.first(images).relu()
        self.seen = maps.dtype
        return self.last(F.dropout(maps.flatten(1), 0.1, self.training))


def fit(
    checkpoint: Path,
    engine: Engine,
    *,
    epochs: int = 3,
    stop_after: int | None = None,
    network: nn.Module | None = None,
) -> nn.Module:
    """Train a network on a few digits. ``stop_after`` interrupts it after so many epochs."""
    torch.manual_seed(3)
    network = network or Plain()
    engine.prepare(network)
    dataset = data.load("digits").only(0.05)
    schedule = training.Schedule(epochs=epochs, lr=0.05, milestones=(1,), batch_size=20)
    done = 0

    def evaluate() -> dict[str, float]:
        nonlocal done
        if done == stop_after:
            raise Stop
        done += 1
        return {}

    def loss(images: Tensor, labels: Tensor) -> training.Losses:
        return {"loss": F.cross_entropy(network(images), labels)}

    batches = data.Batches(dataset, 20, 0, CPU)
    training.fit("plain", network, loss, batches, schedule, evaluate, checkpoint, {}, engine=engine)
    return network


@pytest.mark.parametrize(
    "engine",
    [Engine(amp="bf16"), Engine(amp="fp16", accumulate=2), Engine(compile=True, channels_last=True)],
    ids=["bf16", "fp16 in two parts", "compiled"],
)
def test_interrupted_training_goes_on_bit_for_bit(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    whole = fit(tmp_path / "checkpoints" / "whole.pt", engine)
    with pytest.raises(Stop):
        fit(tmp_path / "checkpoints" / "parts.pt", engine, stop_after=1)
    assert len(training.read(tmp_path / "checkpoints" / "parts.pt")["history"]) == 1
    parts = fit(tmp_path / "checkpoints" / "parts.pt", engine)
    for own, other in zip(parts.parameters(), whole.parameters(), strict=True):
        assert torch.equal(own, other)
    states = (training.read(tmp_path / "checkpoints" / f"{name}.pt") for name in ("whole", "parts"))
    assert all(("scaler" in state) == (engine.amp == "fp16") for state in states)


@pytest.mark.parametrize(("amp", "dtype"), [("off", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_networks_train_in_the_precision_asked_for(tmp_path: Path, amp: str, dtype: torch.dtype) -> None:
    network = fit(tmp_path / "one.pt", Engine(amp=amp), epochs=1)
    assert network.seen == dtype
    assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_channels_last_is_the_format_of_images_and_weights() -> None:
    engine, network = Engine(channels_last=True), nn.Conv2d(3, 4, 3)
    engine.prepare(network)
    ((images, _, _),) = engine.parts(torch.randn(2, 3, 8, 8), torch.zeros(2))
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in (images, network.weight))


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_step_that_overflows_in_float16_is_skipped(tmp_path: Path) -> None:
    class Overflowing(Plain):
        def forward(self, images: Tensor) -> Tensor:
            return 1e5 * super().forward(images)

    network = Overflowing()
    before = [p.detach().clone() for p in network.parameters()]
    fit(tmp_path / "one.pt", Engine(amp="fp16"), epochs=1, network=network)
    assert all(map(torch.equal, network.parameters(), before))
    assert training.read(tmp_path / "one.pt")["scaler"]["scale"] < 2**16


def test_accumulated_parts_train_as_the_batch(tmp_path: Path) -> None:
    """Without dropout and batch norms, no sample depends on the other samples."""

    class WithoutDropout(Plain):
        def forward(self, images: Tensor) -> Tensor:
            return self.last(self.first(images).relu().flatten(1))

    runs = []
    for accumulate in (1, 3):
        torch.manual_seed(3)
        runs.append(fit(tmp_path / f"{accumulate}.pt", Engine(accumulate=accumulate), network=WithoutDropout()))
        sizes = [len(part) for part, _, _ in Engine(accumulate=accumulate).parts(torch.zeros(20, 1), torch.zeros(20))]
        assert sizes == {1: [20], 3: [7, 7, 6]}[accumulate]
    for one, three in zip(*(run.parameters() for run in runs), strict=True):
        torch.testing.assert_close(one, three, rtol=1e-3, atol=1e-4)
    losses = [training.read(tmp_path / f"{accumulate}.pt")["history"][0]["loss"] for accumulate in (1, 3)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_options_reach_the_engine_and_pytorch() -> None:
    flags = ["--amp", "bf16", "--accumulate", "4", "--channels-last", "--compile", "--tf32", "--workers", "3"]
    arguments = train_cckd.build_parser().parse_args(flags)
    engine = options.engine_of(arguments)
    assert engine == Engine("bf16", 4, compile=True, channels_last=True, tf32=True, workers=3)
    engine.begin()
    assert (torch.get_float32_matmul_precision(), photographs.WORKERS) == ("high", 3)
    assert "workers" not in engine.settings()
    assert Engine().settings() == {}


def test_cuda_graphs_need_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_cckd.main(["--cuda-graphs", "--device", "cpu"])
    assert "--cuda-graphs: needs a GPU, got --device cpu" in capsys.readouterr().err


def test_networks_compile_with_hooks_on_their_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    network = networks.build("resnet8-quarter", 1, 10).eval()
    Engine(compile=True).prepare(network)
    with train_semckd.capture(network, train_semckd.METHODS["SemCKD"]) as captured:
        _, stages = network(torch.randn(2, 1, 16, 16))
        assert all(torch.equal(own, stage) for own, stage in zip(captured.features, stages, strict=True))


SMALL = ["--epochs", "2", "--seeds", "2", "--share", "0.1", "--threads", "1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "flags"),
    [
        (train_cckd, ["--teacher-epochs", "1", "--study", "samplers"]),
        (train_semckd, ["--teacher-epochs", "1", "--studies", "methods", "--methods", "KD", "SemCKD"]),
    ],
    ids=["cckd", "semckd"],
)
def test_students_trained_side_by_side_are_the_same(tmp_path: Path, example: object, flags: list[str]) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    example.main([*SMALL, *flags, "--out", str(one), "--accumulate", "2"])
    example.main([*SMALL, *flags, "--out", str(two), "--accumulate", "2", "--jobs", "2"])
    assert_same_checkpoints(one, two, [path.stem for path in (one / "checkpoints").glob("*.pt")])
    assert (one / "results.json").read_bytes() == (two / "results.json").read_bytes()


def test_the_folder_of_a_run_has_all_that_resumes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    flags = [*SMALL, "--teacher-epochs", "1", "--methods", "KD", "--accumulate", "2"]
    train_tokens.main([*flags, "--run", str(run), "--fresh"])
    config = json.loads((run / "config.json").read_text())
    assert config["arguments"] == [*flags, "--run", str(run), "--fresh"]
    assert config["recipe"]["share"] == 0.1
    assert config["computation"]["accumulate"] == 2
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [(line["network"], line["epoch"]) for line in lines] == [
        ("teacher", 1),
        *((f"kd-seed{seed}", epoch) for seed in (0, 1) for epoch in (1, 2)),
    ]
    assert all(line["seconds"] > 0 and line["loss"] > 0 for line in lines)
    assert {path.name for path in run.iterdir()} == {
        "checkpoints",
        "config.json",
        "figures",
        "log.jsonl",
        "results.json",
        "table.md",
    }
    # A longer run goes on in another folder, with the options of the first.
    capsys.readouterr()
    run.rename(other)
    (other / "checkpoints" / "kd-seed1.pt").unlink()
    table = (other / "table.md").read_text()
    train_tokens.main(["--resume", str(other)])
    assert capsys.readouterr().out.count("finished before") == 2
    assert (other / "table.md").read_text() == table
    with pytest.raises(SystemExit):
        train_icct.main(["--resume", str(other)])
    program = train_icct.build_parser().prog
    assert json.loads((other / "config.json").read_text())["program"] == program  # pytest's name in a test


def test_a_run_that_cannot_be_resumed_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"program": "train_other.py", "arguments": []}))
    for folder, message in ((tmp_path, "got one of train_other.py"), (tmp_path / "no", "cannot be read")):
        with pytest.raises(SystemExit) as stopped:
            train_tokens.main(["--resume", str(folder)])
        assert stopped.value.code == 2
        assert message in " ".join(capsys.readouterr().err.split())
