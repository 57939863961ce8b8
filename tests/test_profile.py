"""``profile``: every byte has an owner, and the prediction is what a real step takes."""

from __future__ import annotations

import json
import logging
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rematerialize as remat
from rematerialize.analytic import on_fake_tensors
from rematerialize.errors import RematerializeError
from rematerialize.prepare import shared_costs
from rematerialize.profiling import Measured
from rematerialize.trial import try_plans
from rematerialize.units import format_bytes
from tests.test_report_html import Elements


class Net(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[part for _ in range(4) for part in (nn.Linear(width, width), nn.GELU())])
        self.register_buffer("scale", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return (self.layers(x) * self.scale).square().mean()


ROWS, WIDTH = 128, 64
PARAMETER_BYTES = 4 * (WIDTH * WIDTH + WIDTH) * 4


def profiled(**options: object) -> remat.Profile:
    torch.manual_seed(0)
    return remat.profile(Net(), (torch.randn(ROWS, WIDTH),), **options)  # type: ignore[arg-type]


def test_what_is_resident_is_told_apart_and_adds_up() -> None:
    found = profiled(optimizer="adamw", reserve="1MiB")
    assert found.resident["parameters"] == PARAMETER_BYTES
    assert found.resident["buffers"] == WIDTH * 4
    assert found.resident["inputs"] == ROWS * WIDTH * 4
    assert found.resident["gradients"] == 0
    assert 2 * PARAMETER_BYTES <= found.resident["optimizer state"] <= 2 * PARAMETER_BYTES + 64
    assert found.resident["reserve"] == 2**20
    assert found.peak_bytes == sum(found.resident.values()) + found.activation_peak_bytes


def test_gradients_that_exist_are_resident() -> None:
    model, x = Net(), torch.randn(ROWS, WIDTH)
    model(x).backward()
    assert remat.profile(model, (x,)).resident["gradients"] == PARAMETER_BYTES


def test_the_peak_is_store_alls_and_its_tensors_and_modules_add_up_to_it() -> None:
    found = profiled()
    plan = remat.plan(Net(), (torch.randn(ROWS, WIDTH),), activation_budget="100%")
    assert found.activation_peak_bytes == plan.store_all_peak_bytes
    assert sum(row.peak_bytes for row in found.modules(None)) == found.activation_peak_bytes
    everything = found.top_tensors(10_000)
    workspace = found.timeline.executions[found.timeline.peak_position].op.transient_bytes
    assert sum(row.size_bytes for row in everything) + workspace == found.activation_peak_bytes
    assert [row.size_bytes for row in everything] == sorted((row.size_bytes for row in everything), reverse=True)


def test_it_says_where_the_peak_is() -> None:
    text = str(profiled())
    assert text.startswith("Training step of Net, everything stored\n")
    assert "layers.7" in text or "(model)" in text
    assert "test_profile.py:" in text
    assert "float32[128, 64]" in text


def test_a_measured_step_is_within_a_percent_and_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(ROWS, WIDTH)
    state = torch.get_rng_state()
    found = remat.profile(model, (x,), measure=True)
    assert found.measured is not None
    assert math.isclose(found.measured.peak_bytes, found.activation_peak_bytes, rel_tol=0.01)
    assert found.measured.step_s > 0
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert "forward" not in vars(model)


def test_metrics_are_flat_floats_and_the_dictionary_is_json() -> None:
    found = profiled(measure=True)
    assert all(isinstance(value, float) for value in found.metrics().values())
    again = json.loads(json.dumps(found.to_dict()))
    assert again["peak_bytes"] == found.peak_bytes
    assert max(again["timeline"]) == found.activation_peak_bytes
    assert again["peak"]["source"]


def test_a_device_that_is_not_here_needs_no_storage() -> None:
    model, x = on_fake_tensors(lambda: (Net(8192), torch.randn(ROWS, 8192)))
    found = remat.profile(model, (x,), device="NVIDIA H100 80GB")
    assert found.analytic
    assert found.resident["parameters"] == 4 * (8192 * 8192 + 8192) * 4
    assert "computed for NVIDIA H100 80GB" in str(found)


def test_an_unknown_device_is_named_with_the_closest() -> None:
    with pytest.raises(RematerializeError, match="did you mean 'NVIDIA H100 80GB'"):
        profiled(device="NVIDIA H100 80 GB")


class Settles(Net):
    """Sets a number at its first call, as Swin's layers shrink their windows to the image."""

    def __init__(self) -> None:
        super().__init__()
        self.window = 4

    def forward(self, x: Tensor) -> Tensor:
        if self.window > 2:
            self.window = 2
        return super().forward(x) * self.window


def test_a_model_that_settles_at_its_first_call_is_measured_and_planned_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rematerialize")
    found = remat.profile(Settles(), (torch.randn(ROWS, WIDTH),), measure=True)
    assert found.measured is not None
    assert math.isclose(found.measured.peak_bytes, found.activation_peak_bytes, rel_tol=0.01)
    assert sum(message.startswith("captured ") for message in caplog.messages) == 1


def test_a_trial_of_a_plan_that_was_made_before_the_model_settled_plans_again_unmeasured(tmp_path: Path) -> None:
    model, inputs = Settles(), (torch.randn(ROWS, WIDTH),)
    plan = remat.plan(model, inputs, activation_budget="100%", cost_cache=tmp_path)
    shared_costs.cache_clear()  # as in a process of its own: to plan again is to measure again
    _, (ours,) = try_plans(model, inputs, [plan])
    assert ours.peak_bytes <= plan.budget_bytes


class Moody(Net):
    def forward(self, x: Tensor) -> Tensor:
        torch._assert_async((x > 99).all(), "not in this mood")
        return super().forward(x)


def test_what_a_measured_step_raises_is_told_as_the_models() -> None:
    with pytest.raises(RematerializeError, match="a step of the model raised RuntimeError: not in this mood"):
        remat.profile(Moody(), (torch.randn(ROWS, WIDTH),), measure=True)


def test_a_steps_time_is_its_kernels_and_what_every_call_takes_besides() -> None:
    found = profiled()
    assert 0 < found.call_s < 1
    assert found.step_s == found.timeline.time_s + found.call_s == found.figures()["step_s"]
    rows = dict(replace(found, measured=Measured(found.activation_peak_bytes, found.step_s, 1, 1.0)).overview())
    assert rows["measured step"].endswith("(prediction +0.0%)")
    assert "checks and autograd" in rows


def test_a_device_that_isnt_here_has_no_time_between_kernels() -> None:
    found = remat.profile(nn.Linear(4, 4), (torch.randn(2, 4),), device="NVIDIA H100 80GB")
    assert found.call_s == 0
    assert "checks and autograd" not in dict(found.overview())


def test_calls_of_many_parameters_take_longer() -> None:
    few, many = (nn.Sequential(*[nn.Linear(4, 4) for _ in range(count)]) for count in (1, 200))
    assert remat.profile(few, (torch.randn(2, 4),)).call_s < remat.profile(many, (torch.randn(2, 4),)).call_s


def test_a_peak_outside_of_the_users_lines_and_a_module_of_a_number_are_told_as_such() -> None:
    model = nn.Sequential(nn.Linear(8, 512), nn.ReLU(), nn.Linear(512, 4))
    found = remat.profile(model, (torch.randn(64, 8),))
    rows = dict(found.overview())
    assert any(line.startswith("(no line of yours)  ") for name, line in rows.items() if name.startswith("reached in"))
    assert re.fullmatch(r"[012] \((Linear|ReLU)\)", rows["in module"])
    line, below = str(found).split("Memory over the step\n")[1].splitlines()[:2]
    assert below.index("backward") <= len(line), "the boundary stands below the drawing, however short"


def test_eagers_peak_stands_beside_its_own_deviation() -> None:
    found = profiled()
    assert dict(found.overview())["figures are of"] == "captured step; eager may need more"
    peak = found.activation_peak_bytes
    rows = dict(replace(found, measured=Measured(peak, 1.0, 2 * peak, 1.0)).overview())
    assert "(prediction +0.0%)" in rows["measured activations"]
    assert "(prediction -50.0%)" in rows["eager's activations"]
    assert "figures are of" not in rows


def test_a_notebook_shows_the_summary_beside_the_memory_and_the_tables_below() -> None:
    found = profiled()
    parsed = Elements(found._repr_html_())
    assert parsed.open == []
    assert not {"script", "style", "link", "img"} & {tag for tag, _ in parsed.found}
    text = " ".join(parsed.text)
    assert f"everything stored {format_bytes(found.activation_peak_bytes)}" in text
    for name, value in found.overview():
        assert f"{name} {value}" in text
    for row in (*found.tensor_rows(), *found.module_table()):
        assert " ".join(row) in text
