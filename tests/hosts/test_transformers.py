"""Models and the Trainer of transformers."""

from __future__ import annotations

from typing import Any

import hosts
import pytest
import torch
from torch import Tensor

import kdkernels
from kdkernels.nn import FeatureCapture

hosts.make_torchvision_importable()
transformers = pytest.importorskip("transformers", reason="transformers is not installed: make test-hosts")
pytest.importorskip("accelerate", reason="accelerate is not installed: make test-hosts")

pytestmark = pytest.mark.filterwarnings("ignore")


def bert(hidden: int = 32, layers: int = 2) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 64}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**sizes, **dropout, vocab_size=50, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def test_layers_and_attention():
    model, tokens = bert(), torch.randint(50, (2, 7))
    names = ["bert.encoder.layer.*", "bert.encoder.layer.*.attention.self", "bert"]
    select = {"bert.encoder.layer.*.attention.self": 0, "bert": "last_hidden_state"}
    with FeatureCapture(model, names, select=select) as capture:
        hidden = model(input_ids=tokens, output_hidden_states=True).hidden_states
        maps = capture.features
    assert len(maps) == 5
    assert torch.equal(maps[0], hidden[1])
    assert torch.equal(maps[4], hidden[-1])
    with FeatureCapture(model, "bert"), pytest.raises(TypeError, match=r"with the keys 'last_hidden_state'"):
        model(input_ids=tokens)


def test_inputs_by_the_names_of_arguments():
    model, tokens = bert(), torch.randint(50, (2, 7))
    with FeatureCapture(model, "bert.encoder.layer.*", of="input", select="hidden_states") as capture:
        hidden = model(input_ids=tokens, output_hidden_states=True).hidden_states
    for one, other in zip(capture.features, hidden, strict=False):
        assert torch.equal(one, other)


def test_token_losses_of_two_widths():
    student, teacher, tokens = bert(32, 2), bert(64, 4), torch.randint(50, (4, 7))
    with (
        FeatureCapture(student, "bert.encoder.layer.1") as ours,
        FeatureCapture(teacher, "bert.encoder.layer.3") as theirs,
    ):
        student(input_ids=tokens)
        with torch.no_grad():
            teacher(input_ids=tokens)
    kdkernels.similarity_preserving_loss(*ours.features, *theirs.features).backward()
    assert student.bert.embeddings.word_embeddings.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model, tokens = bert().train(), torch.randint(50, (2, 7))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with FeatureCapture(model, "bert.encoder.layer.0.output") as capture:
        if reentrant:
            with pytest.raises(RuntimeError, match="use_reentrant=False"):
                model(input_ids=tokens)
            return
        model(input_ids=tokens)
        capture.features[0].square().sum().backward()
    assert model.bert.embeddings.word_embeddings.weight.grad.abs().sum() > 0


class Distilling(transformers.Trainer):
    """As docs/hosts/transformers.md has it."""

    def __init__(self, *args: Any, teacher: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False
        self.teacher = teacher.eval()
        self.hidden = (
            FeatureCapture(self.model, "bert.encoder.layer.1"),
            FeatureCapture(teacher, "bert.encoder.layer.3"),
        )

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        with torch.no_grad():
            self.teacher(**inputs)
        loss = loss + term(*(capture.features[0] for capture in self.hidden))
        return (loss, outputs) if return_outputs else loss


def term(student: Tensor, teacher: Tensor) -> Tensor:
    return 10 * kdkernels.correlation_congruence_loss(student[:, 0], teacher[:, 0])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_against_a_loop_by_hand(tmp_path, accumulate, checkpointing):
    """Accumulation divides the term as it divides the model's own loss."""
    generator = torch.Generator().manual_seed(0)
    data = [
        {"input_ids": torch.randint(50, (7,), generator=generator), "labels": torch.tensor(i % 3)} for i in range(16)
    ]
    student, teacher = bert(32, 2), bert(64, 4)
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulate,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
    )
    Distilling(student, arguments, train_dataset=data, teacher=teacher).train()

    alone = bert(32, 2).train()
    optimizer = torch.optim.SGD(alone.parameters(), 0.1)
    batches = [
        {name: torch.stack([sample[name] for sample in data[i : i + 4]]) for name in data[0]}
        for i in range(0, 8 * accumulate, 4)
    ]
    with (
        FeatureCapture(alone, "bert.encoder.layer.1") as ours,
        FeatureCapture(teacher, "bert.encoder.layer.3") as theirs,
    ):
        for number, batch in enumerate(batches):
            loss = alone(**batch).loss
            with torch.no_grad():
                teacher(**batch)
            ((loss + term(*ours.features, *theirs.features)) / accumulate).backward()
            if (number + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
    for one, other in zip(student.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
