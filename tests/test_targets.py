"""TARGET, SPEC, --dtype and --device: what they mean, and one line with the closest match where they mean nothing."""

from __future__ import annotations

import contextlib
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rematerialize.analytic import analytic_graph
from rematerialize.device_table import DEVICES
from rematerialize.errors import TargetError
from rematerialize.targets import hf
from rematerialize.targets.blocks import checkpoint_blocks
from rematerialize.targets.inputs import argument_hint, resized
from rematerialize.targets.load import Target, default_loss, load
from rematerialize.targets.names import parse_target
from rematerialize.targets.specs import FLOATS, INTEGERS, InputSpec, parse_spec, parse_specs
from rematerialize.zoo import ENTRIES, MODELS

H100 = "NVIDIA H100 80GB"
CODE = """
    import torch
    from torch import nn

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(50, 8)
            self.head = nn.Linear(8, 50)
        def forward(self, input_ids, labels=None):
            print("a forward that prints")
            logits = self.head(self.table(input_ids))
            if labels is None:
                return logits
            return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}

    def make():
        return Words(), {"input_ids": torch.arange(6).reshape(3, 2), "labels": torch.arange(6).reshape(3, 2)}

    def alone():
        return Words()

    def asleep():
        return Words().eval(), (torch.zeros(2, 2, dtype=torch.long),)

    def reads_a_value():
        if torch.ones(2).sum() > 0:
            return Words(), (torch.zeros(2, 2, dtype=torch.long),)

    def fails():
        raise KeyError("no such dataset")

    def gives_a_list():
        return Words(), [torch.zeros(2, 2, dtype=torch.long)]

    def gives_a_number():
        return 3

    def gives_nothing():
        pass

    def quits():
        raise SystemExit("not today")

    number = 3
    instance = Words()
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with user code in it, as the current one; what is imported from it is forgotten afterwards."""
    (tmp_path / "words_model.py").write_text(textwrap.dedent(CODE), encoding="utf-8")
    (tmp_path / "another_model.py").write_text("def f(x): ...\ndef build(x=1): ...\n", encoding="utf-8")
    (tmp_path / "half_model.py").write_text("raise RuntimeError('half a module')\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("words_model", "half_model"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


SHAPES = st.lists(st.integers(0, 99), max_size=4).map(tuple)
NAMES = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)


@given(name=NAMES | st.just(""), dtype=st.sampled_from([*FLOATS, *INTEGERS, "bool"]), shape=SHAPES)
def test_a_spec_says_itself(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    spec = InputSpec(name, dtype, shape)
    assert parse_spec(str(spec)) == spec
    assert parse_spec(f" {spec} ") == spec


@given(shape=SHAPES, bound=st.integers(1, 10**12), dtype=st.sampled_from(list(INTEGERS)))
def test_a_bound_says_itself(shape: tuple[int, ...], bound: int, dtype: str) -> None:
    spec = InputSpec("ids", dtype, shape, bound)
    assert parse_spec(str(spec)) == spec


@given(text=st.text(max_size=40))
def test_no_text_is_anything_but_a_spec_or_one_line(text: str) -> None:
    with contextlib.suppress(TargetError):
        spec = parse_spec(text)
        assert parse_spec(str(spec)) == spec


@given(text=st.text(max_size=40))
def test_no_text_is_anything_but_a_target_or_one_line(text: str) -> None:
    with contextlib.suppress(TargetError):
        assert parse_target(text).where


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("x=f32[2,3]", InputSpec("x", "float32", (2, 3))),
        ("x=float[2]", InputSpec("x", "float32", (2,))),
        ("bf16[4]", InputSpec("", "bfloat16", (4,))),
        ("x=torch.int64[4]", InputSpec("x", "int64", (4,))),
        ("x=LONG[4]", InputSpec("x", "int64", (4,))),
        ("x = i64 [ 4 , 5 ] < 7", InputSpec("x", "int64", (4, 5), 7)),
        ("mask=bool[]", InputSpec("mask", "bool", ())),
    ],
)
def test_short_forms_and_spaces(text: str, means: InputSpec) -> None:
    assert parse_spec(text) == means


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["x"], "expected an input as NAME=DTYPE[DIMS]"),
        (["x=float32"], "expected an input as NAME=DTYPE[DIMS]"),
        (["x=float32[2"], "expected an input as NAME=DTYPE[DIMS]"),
        (["x=flaot32[2]"], "got 'flaot32'; did you mean 'float32'?"),
        (["x=int6[2]"], "did you mean 'int64'?"),
        (["2x=float32[2]"], "expected the name of an argument before the =, got '2x'"),
        (["=float32[2]"], "expected the name of an argument"),
        (["x=float32[2,]"], "expected sizes between the brackets, got ''"),
        (["x=float32[-1]"], "expected sizes between the brackets, got '-1'"),
        (["x=float32[B,2]"], "got 'B'"),
        (["x=float32[2]<5"], "expected an integer type before the bound"),
        (["x=int64[2]<0"], "expected a bound of at least 1"),
        (["x=int64[2]<many"], "expected a bound of at least 1 behind the <, got 'many'"),
        (["x=float32[999999999999,999999999999]"], "elements"),
        (["x=int64[999999999999,4611686]"], "expected at most 576460752303423488 elements"),
        (["x=float32[2]", "float32[2]"], "all NAME=DTYPE[DIMS] or all DTYPE[DIMS]"),
        (["x=float32[2]", "x=float32[2]"], "expected every input once, got 'x'"),
    ],
)
def test_a_wrong_spec_says_what_was_expected(texts: list[str], says: str) -> None:
    with pytest.raises(TargetError) as raised:
        parse_specs(texts)
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("gpt", "did you mean 'zoo:gpt'?"),
        ("words_model", "did you mean 'words_model.py:make'?"),
        ("another_model", "did you mean 'another_model.py:build'?"),
        ("half_model", "did you mean 'half_model.py:FACTORY'?"),
        ("mymodels", "got 'mymodels'; write for example models:make"),
        ("", "PKG.MOD:FACTORY"),
        ("words_model", "PKG.MOD:FACTORY"),
        ("words_model:", "PKG.MOD:FACTORY"),
        (":make", "PKG.MOD:FACTORY"),
        ("zoo:", "expected the name of a model of the zoo"),
        ("zoo:resnet5", "did you mean 'resnet50'?"),
        ("zoo:GPT", "did you mean 'gpt'?"),
        ("zoo:gpt@bnch", "expected one of test, bench behind the @, got 'bnch'"),
        ("words_model.py", "expected a factory as FILE.py:FACTORY"),
        ("words_model.py:", "write for example words_model.py:make"),
        ("word_model.py:make", "there is no file word_model.py; did you mean 'words_model.py'?"),
        ("nofile.py:make", "there is no file nofile.py"),
        ("no/such/folder/model.py:make", "no/such/folder/model.py"),
        ("hf:cnfig.json", "did you mean 'config.json'?"),
        ("hf:", "config.json"),
        ("words_mdel:make", "no module named 'words_mdel' here"),
        ("words_mdel:make", "did you mean 'words_model'?"),
        ("words_model:mke", "words_model has no 'mke'; did you mean 'make'?"),
        ("words_model:zzz", "words_model has no 'zzz'; it defines make, alone, asleep, reads_a_value, fails, "),
        ("words_model.py:zzz", "gives_a_list, gives_a_number, gives_nothing, 1 more; check the factory"),
        ("words_model:Words.absent", "words_model has no 'Words.absent'"),
        ("words_model:number", "is an object of type int; it must be a function"),
        ("words_model:instance", "is an object of type Words; it must be a function"),
        (
            "words_model:alone",
            "returned a model alone (Words); it must return (model, example_inputs), or give the inputs, such as "
            "--input input_ids=int64[8,64]",
        ),
        ("words_model:gives_a_list", "returned an object of type list as example inputs"),
        (
            "words_model:gives_a_number",
            "returned an object of type int; it must return (model, example_inputs) or a model",
        ),
        ("words_model:gives_nothing", "returned None; it must return (model, example_inputs) or a model"),
        ("words_model:fails", "the factory words_model:fails raised KeyError: 'no such dataset'"),
        ("words_model:quits", "the factory words_model:quits raised SystemExit: not today"),
        ("half_model:make", "importing half_model for the factory raised RuntimeError: half a module"),
        ("./half_model.py:make", "RuntimeError: half a module"),
    ],
)
def test_a_wrong_target_says_what_was_expected(target: str, says: str, here: Path) -> None:
    if target != "hf:":
        (here / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(TargetError) as raised:
        load(target)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("target", ["mymodels", "nofile.py:make", "words_model.py:zzz"])
def test_what_is_far_from_every_name_suggests_none(target: str, here: Path) -> None:
    with pytest.raises(TargetError) as raised:
        load(target)
    assert "did you mean" not in str(raised.value)


def test_a_targets_own_failure_names_its_line(here: Path) -> None:
    line = 1 + (here / "words_model.py").read_text().splitlines().index('    raise KeyError("no such dataset")')
    with pytest.raises(TargetError, match=rf"words_model\.py, line {line}\)") as raised:
        load("words_model:fails")
    assert isinstance(raised.value.__cause__, KeyError)


@pytest.mark.parametrize("target", ["words_model:make", "words_model.py:make", "./words_model.py:make"])
def test_a_factory_by_module_or_by_file(target: str, here: Path) -> None:
    made = load(target)
    assert type(made.model).__name__ == "Words"
    assert made.model.training
    assert isinstance(made.inputs, dict)
    assert made.batch == 3
    assert not made.fake


def test_a_model_alone_takes_its_inputs_from_specs(here: Path) -> None:
    made = load("words_model:alone", ["input_ids=int64[4,9]", "labels=int64[4,9]<3"])
    assert isinstance(made.inputs, dict)
    assert made.inputs["input_ids"].shape == (4, 9)
    assert made.inputs["input_ids"].unique().numel() > 3, "ids are drawn below the embedding's size"
    assert made.inputs["labels"].max() < 3
    assert made.loss_of(made.model(**made.inputs)).isfinite()
    again = load("words_model:alone", ["input_ids=int64[4,9]", "labels=int64[4,9]<3"])
    assert torch.equal(made.inputs["input_ids"], again.inputs["input_ids"])  # type: ignore[call-overload]
    assert all(torch.equal(a, b) for a, b in zip(made.model.parameters(), again.model.parameters(), strict=True))


def test_specs_replace_the_targets_own_inputs_and_may_be_positional(here: Path) -> None:
    made = load("words_model:make", ["int64[4,9]"])
    assert isinstance(made.inputs, tuple)
    assert made.inputs[0].shape == (4, 9)
    assert made.inputs[0].max() < 50


def test_a_spec_of_an_unknown_argument_names_the_closest(here: Path) -> None:
    with pytest.raises(TargetError, match=r"takes no input 'input_id'; did you mean 'input_ids'\?"):
        load("words_model:alone", ["input_id=int64[4,9]"])


@pytest.mark.parametrize(
    ("specs", "says"),
    [
        (["labels=int64[4,9]"], "missing a required argument: 'input_ids'; it takes (input_ids, labels=None)"),
        (["int64[4,9]", "int64[4,9]", "int64[4,9]"], "too many positional arguments"),
    ],
)
def test_inputs_that_make_no_call_say_what_the_forward_takes(specs: list[str], says: str, here: Path) -> None:
    with pytest.raises(TargetError) as raised:
        load("words_model:alone", specs)
    assert says in str(raised.value)


def test_an_input_larger_than_the_machine_is_named_with_its_size(here: Path) -> None:
    huge = ["input_ids=int64[99999999,99999]"]
    with pytest.raises(TargetError) as raised:
        load("words_model.py:make", huge)
    assert "the input 'input_ids=int64[99999999,99999]' takes 72.76 TiB, this machine has" in str(raised.value)
    assert "name a --device that isn't here" in str(raised.value)
    assert load("words_model.py:make", huge, device="NVIDIA H100 80GB").fake


def test_missing_inputs_are_asked_for_by_the_forwards_own_names() -> None:
    class Pair(nn.Module):
        def forward(self, image: Tensor, token_ids: Tensor, scale: float = 1.0, *, mask: Tensor, **more: Any) -> None:
            """Takes three."""

    said = "--input image=float32[8,64] --input token_ids=int64[8,64] --input mask=float32[8,64]"
    assert argument_hint(Pair()) == said


def test_a_sleeping_model_is_woken(here: Path) -> None:
    assert load("words_model:asleep").model.training


def test_loading_leaves_generator_and_default_type_alone(here: Path) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    made = load("words_model:make", dtype="bf16")
    assert all(parameter.dtype == torch.bfloat16 for parameter in made.model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("dtype", "says"),
    [("bflot16", "did you mean 'bfloat16'?"), ("int64", "expected one of float64, float32, float16, bfloat16")],
)
def test_a_wrong_type_says_what_was_expected(dtype: str, says: str) -> None:
    with pytest.raises(TargetError) as raised:
        load("zoo:gpt", dtype=dtype)
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("NVIDIA H100 8GB", f"did you mean '{H100}'?"),
        ("cpuu", "did you mean 'cpu'?"),
        ("cuda:x", "expected --device as one of cpu, cuda"),
        ("toaster", "expected --device as one of cpu, cuda"),
    ],
)
def test_a_wrong_device_says_what_was_expected(device: str, says: str) -> None:
    with pytest.raises(TargetError) as raised:
        load("zoo:gpt", device=device)
    assert says in str(raised.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_here_names_the_way_round() -> None:
    with pytest.raises(TargetError, match=f"no CUDA device here.*{H100}"):
        load("zoo:gpt", device="cuda")


def test_the_device_table_says_where_every_figure_comes_from() -> None:
    assert all(spec.source for spec in DEVICES.values())


def test_a_device_of_the_table_makes_fake_tensors() -> None:
    made = load("zoo:gpt", device="nvidia  h100 80gb", batch=5)
    assert made.fake
    assert made.spec is DEVICES[H100]
    assert made.batch == 5
    graph = analytic_graph(made.model, made.inputs, DEVICES[H100])
    assert sum(op.time_s for op in graph.ops) > 0


def test_billions_of_parameters_take_no_memory() -> None:
    with pytest.raises(TargetError, match="too large for real tensors"):
        load("zoo:gpt-8.3b")
    made = load("zoo:gpt-8.3b", device=H100, dtype="bfloat16")
    assert 8.2e9 < sum(parameter.numel() for parameter in made.model.parameters()) < 8.4e9
    assert next(made.model.parameters()).dtype == torch.bfloat16


def test_a_factory_that_reads_values_can_not_be_faked_and_says_so(here: Path) -> None:
    load("words_model:reads_a_value")
    with pytest.raises(TargetError, match="reads a tensor's value while it is made"):
        load("words_model:reads_a_value", device=H100)


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 7])
def test_a_target_at_another_batch(batch: int, fake: bool) -> None:
    made = load("zoo:bert", fake=fake)
    other = made.with_batch(batch)
    assert isinstance(made.inputs, dict)
    assert isinstance(other.inputs, dict)
    assert other.batch == batch
    for name, tensor in other.inputs.items():
        assert tensor.shape == (batch, *made.inputs[name].shape[1:])
        assert tensor.dtype == made.inputs[name].dtype
    if not fake:
        assert torch.equal(other.inputs["tokens"][0], made.inputs["tokens"][0])
        assert made.loss_of(made.model(**other.inputs)).isfinite()


def test_the_batch_may_stand_in_another_dimension() -> None:
    made = load("zoo:lstm", batch=3, batch_dim=1)
    assert isinstance(made.inputs, tuple)
    assert [tuple(tensor.shape) for tensor in made.inputs] == [(200, 3, 8), (200, 3, 8)]


def test_a_batch_needs_a_dimension_and_a_size() -> None:
    with pytest.raises(TargetError, match="an input with a dimension 9"):
        load("zoo:gpt", batch=2, batch_dim=9)
    with pytest.raises(TargetError, match="a batch of at least 1, got 0"):
        load("zoo:gpt", batch=0)


def test_resizing_keeps_what_is_no_batch_and_what_is_passed_twice() -> None:
    x, weight = torch.randn(4, 2, requires_grad=True), torch.randn(3)
    again = resized((x, [x, weight], "text"), 6, 0)
    assert again[0] is again[1][0]  # type: ignore[index]
    assert again[0].requires_grad  # type: ignore[index]
    assert again[1][1] is weight  # type: ignore[index]
    assert again[2] == "text"  # type: ignore[index]


def test_the_loss_that_nobody_named() -> None:
    x = torch.randn(3, requires_grad=True)
    assert default_loss(x.sum()).item() == x.sum().item()
    assert default_loss({"loss": x.sum() * 2, "logits": x}).item() == (x.sum() * 2).item()
    assert torch.isclose(default_loss((x, {"y": x * 2}, torch.ones(2))), x.mean() + (x * 2).mean())
    with pytest.raises(TargetError, match="nothing that can be differentiated"):
        default_loss((x.detach(), 3))


BY_CLASS = {
    "gpt2": {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_positions": 16, "n_embd": 16, "n_head": 2},
    "bert": {"model_type": "bert", "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32},
    "vit": {"model_type": "vit", "architectures": ["ViTForImageClassification"], "image_size": 16, "patch_size": 8},
    "choice": {"model_type": "gpt2", "architectures": ["GPT2ForSequenceClassification"], "n_embd": 16, "n_head": 2},
}
SMALL = {"vocab_size": 40, "num_hidden_layers": 1, "n_layer": 1, "max_position_embeddings": 16}
SMALL_VIT = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}


def config(folder: Path, **fields: object) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return f"hf:{folder}"


@pytest.mark.parametrize("kind", BY_CLASS)
def test_a_configuration_of_transformers_is_a_target_with_a_loss(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    more = SMALL_VIT if kind == "vit" else {}
    made = load(config(tmp_path / kind, **SMALL, **BY_CLASS[kind], **more), batch=2)
    assert made.model.training
    assert made.batch == 2
    assert isinstance(made.inputs, dict)
    loss: Tensor = made.loss_of(made.model(**made.inputs))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.dim() == 0
    faked = load(config(tmp_path / kind, **SMALL, **BY_CLASS[kind], **more), device=H100)
    assert faked.fake


def test_a_configuration_by_its_file_with_inputs_of_ones_own(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    target = config(tmp_path, **SMALL, **BY_CLASS["gpt2"]) + "/config.json"
    made = load(target, ["input_ids=int64[2,5]"])
    assert isinstance(made.inputs, dict)
    assert {name: tuple(tensor.shape) for name, tensor in made.inputs.items()} == {
        "input_ids": (2, 5),
        "labels": (2, 5),
    }
    with pytest.raises(TargetError, match=r"takes no input 'input_id'; did you mean 'input_ids'\?"):
        load(target, ["input_id=int64[2,5]"])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model_type": "gtp2"}, "did you mean 'gpt2'?"),
        ({}, "expected a model_type"),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHedModel"]}, "did you mean 'GPT2LMHeadModel'?"),
        ({"model_type": "gpt2", "n_embd": 10, "n_head": 3}, "making the model of hf:"),
    ],
)
def test_a_wrong_configuration_says_what_was_expected(fields: dict[str, object], says: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(TargetError) as raised:
        load(config(tmp_path, **fields))
    assert says in str(raised.value)


def test_a_configuration_that_is_no_json_is_named(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(TargetError, match="is not a transformers configuration"):
        load(f"hf:{tmp_path}")


def test_without_transformers_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(TargetError, match=r"pip install rematerialize\[models\]"):
        load(config(tmp_path, model_type="gpt2"))
    assert hf.__doc__


def test_a_model_of_the_zoo_that_lacks_its_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TargetError, match=r"zoo:gat needs the package torch_geometric.*rematerialize\[models\]"):
        parse_target("zoo:gat")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.parts(x)


class Stages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(Layer(), Layer()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return x


@pytest.mark.parametrize(
    ("model", "where"),
    [
        (Stages(), "4 blocks in stages.0, stages.1"),
        (nn.Sequential(Layer(), Layer(), nn.Tanh()), "2 blocks in the model itself"),
        (nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), "3 blocks in the model itself"),
    ],
    ids=["stages", "blocks", "layers"],
)
def test_checkpointing_goes_around_the_innermost_repeated_blocks(model: nn.Module, where: str) -> None:
    x = torch.randn(3, 4)
    before = model(x)
    assert checkpoint_blocks(model) == where
    assert torch.equal(before, model(x))


def test_what_does_not_repeat_can_not_be_checkpointed_per_block() -> None:
    with pytest.raises(TargetError, match="two children of one class"):
        checkpoint_blocks(nn.Linear(2, 2))


def test_the_registry_and_its_factories_agree() -> None:
    assert MODELS.keys() < ENTRIES.keys()
    assert all(spec.about for spec in ENTRIES.values())
    made: Target = load("zoo:gpt", per_block=True)
    assert made.note == "by hand"
