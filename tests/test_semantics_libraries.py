"""Libraries that run the training loop: transformers' Trainer and accelerate train a wrapped model as eager's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import rematerialize as remat
from tests.twins import same

pytestmark = pytest.mark.usefixtures("quick_plans")


def language_model() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2))  # type: ignore[no-any-return]


def rows(count: int) -> list[dict[str, Tensor]]:
    tokens = torch.randint(0, 64, (count, 16), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in tokens]


def trained_by_trainer(model: nn.Module, where: Path, options: dict[str, Any]) -> list[Any]:
    """What it logs, and the weights; the last batch of an epoch is smaller."""
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "logging_steps": 1, "eval_strategy": "epoch"}
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    trainer = Trainer(
        model=model,  # type: ignore[arg-type]
        args=TrainingArguments(output_dir=str(where), **settings, **quiet, **options),  # type: ignore[arg-type]
        train_dataset=rows(10),  # type: ignore[arg-type]
        eval_dataset=rows(4),  # type: ignore[arg-type]
    )
    trainer.train()
    logged = [[entry.get(name) for name in ("loss", "grad_norm", "eval_loss")] for entry in trainer.state.log_history]
    return [logged, *(p.detach().clone() for p in model.parameters())]


@pytest.mark.parametrize(
    "options",
    [{}, {"bf16": True, "gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}],
    ids=["plain", "bf16 and accumulation", "gradient checkpointing"],
)
def test_transformers_trainer_trains_a_wrapped_model_as_eagers(options: dict[str, Any], tmp_path: Path) -> None:
    ours = remat.wrap(language_model(), activation_budget="60%")
    expected = trained_by_trainer(language_model(), tmp_path / "eager", options)
    found = trained_by_trainer(ours, tmp_path / "ours", options)
    assert found[0] == expected[0]
    assert all(same(a, b) for a, b in zip(found[1:], expected[1:], strict=True))
    plans = remat.plans_of(ours)
    assert len(plans) == 2  # one for each size of batch
    assert any(plan.recomputed for plan in plans)


def trained_by_accelerator(model: nn.Module, accelerator: Accelerator) -> list[Tensor]:
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    found = []
    for step in range(3):
        torch.manual_seed(step)
        loss = prepared(**torch.utils.data.default_collate(rows(4))).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return [*found, *(p.detach().clone() for p in model.parameters())]


def test_accelerates_mixed_precision_goes_around_a_wrapped_model_and_off_again() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # Trainer leaves its own in the process
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    ours = remat.wrap(language_model(), activation_budget="60%")
    expected = trained_by_accelerator(language_model(), accelerator)
    found = trained_by_accelerator(ours, accelerator)
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    assert any(plan.recomputed for plan in remat.plans_of(ours))
    with pytest.raises(remat.RematerializeError, match="already wrapped"):
        remat.wrap(ours, activation_budget="60%")
    with pytest.raises(remat.RematerializeError, match="another wrapper stands around"):
        remat.unwrap(ours)
    bare = accelerator.unwrap_model(ours, keep_fp32_wrapper=False)
    bare(**torch.utils.data.default_collate(rows(4))).loss.backward()  # in float32 now: a plan of its own
    assert len(remat.plans_of(bare)) == 2
    assert "forward" not in vars(remat.unwrap(bare))
