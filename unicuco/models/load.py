"""Load a causal language model for pruning: eval mode, no gradients asked for, every weight finite.

A multi-modal model (LLaVA) is loaded through its conditional-generation class, and used with text
alone.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.utils import logging

from unicuco.errors import ModelError
from unicuco.memory import is_lack_of_memory
from unicuco.models.folder import (
    check_model_folder,
    model_digest,
    read_config,
    resolve_model,
    weight_files,
)
from unicuco.models.quantised import check_known, read_state, round_eight_bit_inputs
from unicuco.models.stored import with_stored_bytes
from unicuco.models.structure import profile_model
from unicuco.types import ModelProfile


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory with what was found in it, and the folder it came from."""

    model: PreTrainedModel
    profile: ModelProfile
    folder: Path


def load_model(
    name: str | Path, *, dtype: torch.dtype = torch.float32, fewer_bits: bool = False
) -> LoadedModel:
    """Load a model, check its weights, and find its sites and blocks.

    Args:
        name: as `resolve_model` takes it.
        dtype: of every weight in memory.
        fewer_bits: also take a variant of fewer bits, as the floats that its codes stand for.

    Raises:
        ModelError: no usable model is there, a weight is NaN or infinite (named), or the model is
            no causal decoder of repeated blocks.
    """
    folder = _resolve(name)
    config = _load_config(folder, fewer_bits=fewer_bits)
    codes = config.__dict__.pop("quantization_config", None)
    with quiet_transformers():
        model, report = _from_pretrained(folder, config, dtype, has_codes=codes is not None)
    _check_complete(folder, report)
    _check_finite(folder, model)
    model.eval()
    model.requires_grad_(False)
    if codes is not None:
        round_eight_bit_inputs(model, codes)
    profile = profile_model(model, digest=model_digest(folder))
    profile = with_stored_bytes(profile, model, weight_files(folder))
    return LoadedModel(model=model, profile=profile, folder=folder)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies beside a model.

    Raises:
        ModelError: the folder holds none that can be read.
    """
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    # A missing or damaged tokenizer surfaces as almost any exception type, by family.
    except Exception as error:
        raise ModelError(
            f"{folder} holds no tokenizer that can be read; put the model's tokenizer files there "
            f"({_first_line(error)})"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelError(
            f"{folder} holds no tokenizer that can be read; put the model's tokenizer files there "
            f"(got {type(tokenizer).__name__})"
        )
    return tokenizer


def build_skeleton(
    config: Mapping[str, Any], *, dtype: torch.dtype = torch.float32, on_meta: bool = False
) -> PreTrainedModel:
    """Build a model from the contents of ``config.json`` alone.

    Args:
        config: the JSON object, ``model_type`` included. (Any: it is JSON of any family.)
        dtype: of every parameter.
        on_meta: leave parameters without memory at all, on torch's meta device; buffers are real.

    Returns:
        The model in eval mode, no gradients asked for; its parameters are not initialised and must
        all be set before use, its buffers are ready. Tied parameters are tied.

    Raises:
        ModelError: the configuration is of no known causal language model.
    """
    fields = dict(config)
    model_type = fields.pop("model_type", None)
    try:
        parsed = AutoConfig.for_model(model_type, **fields)
    except Exception as error:
        raise ModelError(f"the configuration can't be used: {_first_line(error)}") from error
    return _build(parsed, dtype=dtype, on_meta=on_meta)


def build_on_meta(folder: Path) -> PreTrainedModel:
    """Build the model of a folder as `build_skeleton` does, without memory for its parameters.

    Raises:
        ModelError: no usable model is there.
    """
    check_model_folder(folder)
    return _build(_load_config(folder), dtype=torch.float32, on_meta=True)


def _build(parsed: PreTrainedConfig, *, dtype: torch.dtype, on_meta: bool) -> PreTrainedModel:
    auto = _auto_class(parsed, "this configuration")
    # Untouched memory is not backed by pages: a skeleton costs no memory until weights are set.
    place = _parameters_on_meta() if on_meta else nullcontext()
    with quiet_transformers(), no_init_weights(), place:
        model = auto.from_config(parsed, dtype=dtype)
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"the configuration builds a {type(model).__name__}, not a language model")
    model.tie_weights()  # part of the initialisation that was left out
    model.eval()
    model.requires_grad_(False)
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Give every parameter that this thread registers inside the block to the meta device.

    At most one is in memory at a time, and untouched; buffers stay where they are made.
    """
    thread = threading.get_ident()

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if threading.get_ident() != thread or parameter.is_meta:  # tied ones stay the same object
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    # torch takes what a hook returns, whatever its annotation says
    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def _resolve(name: str | Path) -> Path:
    if isinstance(name, str):
        return resolve_model(name)
    check_model_folder(name)
    return name


def _load_config(folder: Path, *, fewer_bits: bool = False) -> PreTrainedConfig:
    try:
        with quiet_transformers():
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    # An unknown model_type, a wrong field type, code in the folder: each its own exception type.
    except Exception as error:
        named = read_config(folder).get("model_type")
        raise ModelError(
            f"{folder}: transformers can't use its config.json (model_type {named!r}): "
            f"{_first_line(error)}"
        ) from error
    codes = getattr(config, "quantization_config", None)
    if codes is not None:
        check_known(folder, codes if fewer_bits else {})
    return config


# Any: the auto classes share no typed base.
def _auto_class(config: PreTrainedConfig, what: str) -> Any:
    kind = type(config)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{what} is an encoder-decoder ({kind.__name__}); a causal decoder-only model is needed"
        )
    # Some image-text configurations are in both; the checkpoint was saved by the class it names.
    causal = kind in AutoModelForCausalLM._model_mapping
    multimodal = kind in AutoModelForImageTextToText._model_mapping
    saved_by = (config.architectures or [""])[0]
    if multimodal and not (causal and saved_by.endswith("CausalLM")):
        return AutoModelForImageTextToText
    if causal:
        return AutoModelForCausalLM
    raise ModelError(
        f"{what} ({kind.__name__}) is no causal language model: transformers has no causal or "
        "image-text-to-text class for it (encoders such as BERT can't be used)"
    )


def _from_pretrained(
    folder: Path, config: PreTrainedConfig, dtype: torch.dtype, *, has_codes: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    auto = _auto_class(config, str(folder))
    # The class itself takes tensors without a folder; the automatic one does not.
    kind = auto._model_mapping[type(config)] if has_codes else auto
    try:
        model, report = kind.from_pretrained(
            None if has_codes else folder,
            state_dict=read_state(weight_files(folder)) if has_codes else None,
            config=config,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    # Shapes that differ, a missing library, too little memory: transformers raises anything here.
    except Exception as error:
        if is_lack_of_memory(error):
            raise ModelError(
                f"{folder} does not fit into memory as a whole; learn it in more --shards, or free "
                "some memory"
            ) from error
        raise ModelError(f"{folder} can't be loaded: {_first_line(error)}") from error
    return model, report


def _check_complete(folder: Path, report: Mapping[str, Any]) -> None:
    missing = sorted(map(str, report["missing_keys"]))
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} weights of a causal language model, e.g. {missing[0]}; "
            "it may be an encoder or a base model without its head"
        )
    if report["mismatched_keys"]:
        named = sorted(str(key[0]) for key in report["mismatched_keys"])
        raise ModelError(f"{folder}: the shape of {named[0]} does not fit config.json")


def _check_finite(folder: Path, model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if parameter.numel() == 0:
            continue
        # NaN passes through min and max: two scalars tell all without a mask of the tensor's size.
        low, high = torch.aminmax(parameter.detach())
        if not (math.isfinite(float(low)) and math.isfinite(float(high))):
            raise ModelError(
                f"{folder}: the tensor {name} holds NaN or infinite weights; repair the checkpoint"
            )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' log and progress bars inside the block.

    What matters of them goes into errors; on the console they would break ``--json``.
    """
    verbosity = logging.get_verbosity()
    bar = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
