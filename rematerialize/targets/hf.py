"""``hf:config.json``: a model of transformers from its configuration, with random weights and nothing downloaded.

The class is the configuration's first ``architectures`` entry, or else the first that knows the configuration among
transformers' automatic classes. Parameters have torch's default type (``--dtype``), whatever the configuration says of
saved weights. Labels are added for the heads that take them, so that there is a loss.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rematerialize.errors import TargetError, did_you_mean
from rematerialize.targets.factory import blame
from rematerialize.targets.inputs import make_inputs
from rematerialize.targets.names import TargetName
from rematerialize.targets.specs import InputSpec

_LONGEST_TEXT = 512
_AUTOMATIC = (
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForCausalLM",
    "AutoModelForImageClassification",
    "AutoModel",
)
_SCORES_TEXT = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration", "ForPreTraining")
_CLASSIFIES = (
    "ForSequenceClassification",
    "ForImageClassification",
    "ForAudioClassification",
    "ForVideoClassification",
)


def make(name: TargetName, specs: Sequence[InputSpec], seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model of a configuration file in train mode, and its example inputs.

    Raises
    ------
    TargetError
        If transformers isn't installed, doesn't know the configuration, or raises.
    """
    transformers = _transformers()
    path = Path(name.where)
    config = _config(transformers, path)
    with blame(f"making the model of {name.text}"):
        torch.manual_seed(seed)
        model: nn.Module = _build(transformers, config, path).train()
    parameters = inspect.signature(model.forward).parameters
    wanted = [*specs] if specs else _default_specs(model, config, name)
    if wanted and not wanted[0].name:
        named = zip(wanted, parameters, strict=False)
        wanted = [InputSpec(argument, spec.dtype, spec.shape, spec.bound) for spec, argument in named]
    given = {spec.name for spec in wanted}
    for spec in specs:
        if spec.name and spec.name not in parameters:  # its forwards take any keyword and forget it
            near = did_you_mean(spec.name, parameters)
            raise TargetError(f"{type(model).__name__} takes no input {spec.name!r}{near} (in {str(spec)!r})")
    wanted = [_bounded(spec, config) for spec in (*wanted, *_label_specs(model, config, wanted))]
    inputs = dict(make_inputs(wanted, model))
    if "labels" in inputs and "labels" not in given and "input_ids" in inputs and inputs["labels"].dim() == 2:
        inputs["labels"] = inputs["input_ids"].clone()
    if "return_loss" in parameters:
        inputs["return_loss"] = True
    return model, inputs


def _transformers() -> Any:
    # Before the first import: some models look for their kernels on the hub otherwise
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
    except ImportError as error:
        raise TargetError(
            f"an hf: target needs transformers, which can't be imported ({error}): pip install rematerialize[models]"
        ) from error
    quiet: Any = transformers.logging.set_verbosity_error
    quiet()  # it talks of generation, which isn't what is planned
    return transformers


def _config(transformers: Any, path: Path) -> Any:
    try:
        found, _ = transformers.PretrainedConfig.get_config_dict(str(path), local_files_only=True)
    except Exception as error:
        raise TargetError(f"{path} is not a transformers configuration: {_first_line(error)}") from error
    kind = found.get("model_type")
    known = list(transformers.CONFIG_MAPPING.keys())
    if kind not in known:
        near = did_you_mean(str(kind or ""), known)
        raise TargetError(
            f"expected a model_type that transformers {transformers.__version__} knows in {path}, got {kind!r}{near}"
        )
    with blame(f"the configuration {path}"):
        config = transformers.AutoConfig.from_pretrained(str(path), local_files_only=True)
    for part in (
        config,
        *(value for value in vars(config).values() if isinstance(value, transformers.PretrainedConfig)),
    ):
        if getattr(part, "use_cache", None):
            part.use_cache = False  # keys and values of the past are for generation
        if getattr(part, "is_encoder_decoder", False) and getattr(part, "decoder_start_token_id", None) is None:
            part.decoder_start_token_id = 0
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = getattr(config, "eos_token_id", None) or 0
    return config


def _build(transformers: Any, config: Any, path: Path) -> Any:
    for wanted in config.architectures or ():
        if hasattr(transformers, wanted):
            return getattr(transformers, wanted)(config)
        near = did_you_mean(wanted, (known for known in dir(transformers) if known[0].isupper()))
        raise TargetError(f"expected an architecture that transformers knows in {path}, got {wanted!r}{near}")
    for automatic in _AUTOMATIC:
        kind = getattr(transformers, automatic)
        if type(config) in kind._model_mapping:
            return kind.from_config(config)
    raise TargetError(f"no automatic class of transformers makes a model of {path}: add its class as architectures")


def _default_specs(model: Any, config: Any, name: TargetName) -> list[InputSpec]:
    parameters = inspect.signature(model.forward).parameters
    text, vision = _part(config, "text_config"), _part(config, "vision_config")
    specs = []
    if "input_ids" in parameters:
        longest = getattr(text, "max_position_embeddings", None) or _LONGEST_TEXT
        specs.append(InputSpec("input_ids", "int64", (1, min(int(longest), _LONGEST_TEXT))))
    if "pixel_values" in parameters and hasattr(vision, "image_size"):
        size = vision.image_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        channels = getattr(vision, "num_channels", 3)
        specs.append(InputSpec("pixel_values", _default_dtype(), (1, int(channels), int(height), int(width))))
    if not specs:
        takes = getattr(model, "main_input_name", "an input")
        raise TargetError(
            f"no default inputs for {name.text}, whose main input is {takes!r}: give --input {takes}=DTYPE[DIMS]"
        )
    return specs


def _default_dtype() -> str:
    return str(torch.get_default_dtype()).removeprefix("torch.")


def _part(config: Any, name: str) -> Any:
    return getattr(config, name, None) or config


def _label_specs(model: Any, config: Any, given: Iterable[InputSpec]) -> list[InputSpec]:
    """What the head compares with, where it takes such a thing and wasn't given any."""
    shapes = {spec.name: spec.shape for spec in given}
    parameters = inspect.signature(model.forward).parameters
    kind = type(model).__name__
    main = shapes.get("input_ids") or shapes.get("pixel_values") or next(iter(shapes.values()), ())
    batch = main[:1]
    wanted: dict[str, tuple[int, ...]] = {}
    classes = int(getattr(config, "num_labels", 2) or 2)
    if kind.endswith(_SCORES_TEXT) and "input_ids" in shapes:
        wanted = {"labels": main, "next_sentence_label": batch}
        classes = 2
    elif kind.endswith("ForTokenClassification") and "input_ids" in shapes:
        wanted = {"labels": main}
    elif kind.endswith(_CLASSIFIES):
        wanted = {"labels": batch}
    elif kind.endswith("ForQuestionAnswering"):
        wanted, classes = {"start_positions": batch, "end_positions": batch}, 1
    return [
        InputSpec(name, "int64", shape, classes)
        for name, shape in wanted.items()
        if name in parameters and name not in shapes
    ]


def _bounded(spec: InputSpec, config: Any) -> InputSpec:
    """Give ids the vocabulary as their bound."""
    vocabulary = getattr(_part(config, "text_config"), "vocab_size", None)
    if spec.name not in {"input_ids", "decoder_input_ids"} or spec.bound is not None or not vocabulary:
        return spec
    return InputSpec(spec.name, spec.dtype, spec.shape, int(vocabulary))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
