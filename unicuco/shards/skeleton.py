"""`Skeleton`: a family's own forward code around blocks that run elsewhere, or not at all.

A stage must know what its blocks are called with: masks, rotary embeddings, positions. All of that
depends on the shape of the input, not on its values, and every family makes it in its own way. So
nothing of it is written again here: the model is built without memory for parameters (meta device),
the blocks' `forward` is replaced for the time of one call, and the family's own code runs:

- to record what each block is called with for windows of a width (`run_block` then calls it so);
- to embed tokens, up to the first block (`embed`);
- to go on from the last block's output to the logits (`logits`), differentiably.

Parameters outside the blocks that a stage does not hold are ghosts: zeros of the right shape that
take four bytes, so that the code around them runs. A family whose code does something with the
hidden states between blocks would be told nothing of it and is refused.

What it does not know: which blocks belong to whom, and where weights come from.

Notation: t tokens, h hidden size, v vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from unicuco.errors import ModelError
from unicuco.models import build_skeleton, quiet_transformers
from unicuco.types import ModelProfile

_TRIAL_TOKENS: Final = 2


@dataclass(frozen=True, slots=True)
class _Call:
    """What a block is called with besides the hidden states. Any: arguments of any family."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _EnoughError(Exception):
    """Raised inside a family's forward code where nothing that follows is of interest."""


class _UnfitError(Exception):
    """Raised where the family's code took what it was given for something else."""


# A block's place, and what it is called with; returns what the family's code shall go on with.
_Handler = Callable[..., Any]


class Skeleton:
    """One model's code.

    Args:
        model_config: the model's configuration as JSON.
        profile: the model's.
        device: torch's name of where it runs.
        dtype: of parameters and hidden states.

    Raises:
        ModelError: the family's code can't be taken apart at its blocks.
    """

    def __init__(
        self,
        model_config: str,
        profile: ModelProfile,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        config = json.loads(model_config)
        self.model = build_skeleton(config, on_meta=True)
        self.model.float().eval()
        self.device = device
        self.dtype = dtype
        for name, buffer in list(self.model.named_buffers(remove_duplicate=False)):
            self.place_buffer(name, buffer.to(device))
        self.profile = profile
        # Any real token: one that pads would only be warned of.
        self._token = int(config.get("pad_token_id") == 0)
        self._blocks = [self.model.get_submodule(path) for path in profile.block_paths]
        self.aliases = _aliases(self.model)
        self._haunt()
        self._returns_tuple = False
        self.before, self.after = self._outer_parameters()
        self._calls: dict[int, list[_Call]] = {}

    def place(self, name: str, tensor: Tensor) -> None:
        """Make a tensor the parameter of a name, and of all names that share it."""
        parameter = nn.Parameter(tensor, requires_grad=False)
        for alias in self.aliases[name]:
            path, _, own = alias.rpartition(".")
            self.model.get_submodule(path)._parameters[own] = parameter

    def place_buffer(self, name: str, tensor: Tensor) -> None:
        """Make a tensor the buffer of a name."""
        path, _, own = name.rpartition(".")
        self.model.get_submodule(path)._buffers[own] = tensor

    @torch.no_grad()
    def embed(self, window: Tensor) -> Tensor:
        """Return what the first block receives, ``1 x t x h``, for ``1 x t`` tokens."""
        found: list[Tensor] = []

        def stop(index: int, *args: Any, **kwargs: Any) -> None:
            found.append(_hidden_of(args, kwargs))
            raise _EnoughError

        self._run(window, stop)
        return found[0]

    def run_block(self, block: int, hidden: Tensor) -> Tensor:
        """Run one block, whose weights are in place, over ``1 x t x h`` hidden states."""
        width = hidden.shape[1]
        if width not in self._calls:
            self._calls[width] = self._record(width)
        call = self._calls[width][block]
        output = self._blocks[block](hidden, *call.args, **call.kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits, ``t x v``, of the last block's output, ``1 x t x h``."""
        last = len(self._blocks) - 1

        def pass_on(index: int, *args: Any, **kwargs: Any) -> Any:
            return self._as_output(hidden if index == last else _hidden_of(args, kwargs))

        logits = self._run(self._dummy(hidden.shape[1]), pass_on)
        assert logits is not None, "nothing stopped it"
        return logits[0]

    def _dummy(self, width: int) -> Tensor:
        return torch.full((1, width), self._token, device=self.device)

    def _as_output(self, hidden: Tensor) -> Any:
        return (hidden,) if self._returns_tuple else hidden

    @torch.no_grad()
    def _record(self, width: int) -> list[_Call]:
        """Return what every block is called with for a window of ``width`` tokens."""
        calls: list[_Call] = []
        start: list[Tensor] = []

        def record(index: int, *args: Any, **kwargs: Any) -> Any:
            hidden = _hidden_of(args, kwargs)
            start[1:] = [hidden]
            if index != len(calls) or hidden is not start[0]:
                raise ModelError(
                    f"{self.profile.architecture} does more than call its blocks one after the "
                    "other, so its stages can't be told apart; use one shard"
                )
            rest = {name: value for name, value in kwargs.items() if value is not hidden}
            calls.append(_Call(args[1:], rest))
            if index == len(self._blocks) - 1:
                raise _EnoughError
            return self._as_output(hidden)

        self._run(self._dummy(width), record)
        return calls

    def _outer_parameters(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the parameters outside the blocks that run before the first, and after the last.

        Also finds out whether blocks return tensors or tuples that begin with one.
        """
        for self._returns_tuple in (False, True):
            before: list[str] = []
            after: list[str] = []
            try:
                logits = self._trial(before, after)
            except (_UnfitError, IndexError):
                continue
            if logits.shape == (1, _TRIAL_TOKENS, self.profile.vocabulary_size):
                return tuple(dict.fromkeys(before)), tuple(dict.fromkeys(after))
        raise ModelError(
            f"{self.profile.architecture} can't be run without its blocks, so it can't be taken "
            "apart into stages; use one shard"
        )

    @torch.no_grad()
    def _trial(self, before: list[str], after: list[str]) -> Tensor:
        """Run all but the blocks on ghosts; note whose parameters are used where."""
        seen = [before]

        def skip(index: int, *args: Any, **kwargs: Any) -> Any:
            hidden = _hidden_of(args, kwargs)
            if hidden.shape[:-1] != (1, _TRIAL_TOKENS):
                raise _UnfitError
            seen[0] = after
            return self._as_output(hidden)

        def note(names: list[str], *_: Any) -> None:
            seen[0] += names

        with ExitStack() as stack:
            for path, module in self._outer_modules():
                names = [
                    f"{path}.{own}".lstrip(".")
                    for own, parameter in module._parameters.items()
                    if parameter is not None
                ]
                stack.callback(module.register_forward_pre_hook(partial(note, names)).remove)
                if isinstance(module, nn.Linear):  # a product would make a whole matrix of a ghost
                    module.__dict__["forward"] = partial(_no_product, module.out_features)
                    stack.callback(module.__dict__.pop, "forward")
            with quiet_transformers():
                logits = self._run(self._dummy(_TRIAL_TOKENS), skip)
        assert logits is not None, "nothing stopped it"
        return logits

    def _outer_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules outside the blocks that have parameters of their own."""
        fronts = tuple(f"{path}." for path in self.profile.block_paths)
        for path, module in self.model.named_modules():
            owns = any(parameter is not None for parameter in module._parameters.values())
            if owns and not f"{path}.".startswith(fronts):
                yield path, module

    def _haunt(self) -> None:
        """Put ghosts in the place of all parameters outside the blocks."""
        ghost = torch.zeros((), device=self.device, dtype=self.dtype)
        for path, module in self._outer_modules():
            for own, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    self.place(f"{path}.{own}".lstrip("."), ghost.expand(parameter.shape))

    def _run(self, ids: Tensor, handler: _Handler) -> Tensor | None:
        """Run the family's code with ``handler`` in the blocks' place; none if that stopped it."""
        for index, block in enumerate(self._blocks):
            block.__dict__["forward"] = partial(handler, index)
        try:
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        except _EnoughError:
            return None
        finally:
            for block in self._blocks:
                del block.__dict__["forward"]
        return logits


def _hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _no_product(out_features: int, inputs: Tensor) -> Tensor:
    return inputs.new_zeros(()).expand(*inputs.shape[:-1], out_features)


def _aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return, for the name of every parameter, all names that share it, in the model's order."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: tuple(group) for group in names.values() for name in group}
