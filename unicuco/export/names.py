"""Finds the tensor in the files that holds each site's matrix.

A checkpoint's names and the loaded model's module paths agree in their tail (block list, index,
module) and may differ in front: GPT-2's hub files lack ``transformer.``, older LLaVA files say
``language_model.model.`` for ``model.language_model.``. A match must be unique for every site and
have the same front for all of them; anything else is no match, and the caller then goes through the
loaded model instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from unicuco.types import ModelProfile, Site


def match_sites(
    profile: ModelProfile, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, str] | None:
    """Map every site path to a tensor name.

    Args:
        profile: the sites, with the paths of their modules in the loaded model.
        shapes: tensor name -> shape, over all files of the checkpoint.

    Returns:
        site path -> tensor name, or none when the sites can't all be matched without doubt.
    """
    matched: dict[str, str] = {}
    fronts: set[str] = set()
    for site in profile.sites:
        tail = _tail(site, profile.block_paths[site.block])
        name = _find(site, tail, shapes)
        if name is None:
            return None
        matched[site.path] = name
        fronts.add(name[: len(name) - len(tail)])
    unique = len(set(matched.values())) == len(matched)
    return matched if unique and len(fronts) <= 1 else None


def named_like(parameter: str, names: Iterable[str]) -> list[str]:
    """Return the tensor of a parameter's name, or else those whose name is its tail."""
    found = [name for name in names if f".{parameter}".endswith(f".{name}")]
    return [parameter] if parameter in found else found


def _find(site: Site, tail: str, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The tensor of one site: of its own name, or else the nearest with the same tail and shape."""
    stored = (site.num_rows, site.num_columns)
    stored = stored[::-1] if site.transposed else stored
    wanted = f"{site.path}.weight"
    if shapes.get(wanted) == stored:
        return wanted
    named = [name for name in shapes if f".{name}".endswith(f".{tail}")]
    return _nearest(wanted, [name for name in named if shapes[name] == stored])


def _tail(site: Site, block_path: str) -> str:
    """The tensor's name from the block list on, e.g. ``layers.0.mlp.up_proj.weight``."""
    front = ".".join(block_path.split(".")[:-2])
    path = site.path.removeprefix(f"{front}.") if front else site.path
    return f"{path}.weight"


def _nearest(wanted: str, names: Sequence[str]) -> str | None:
    """The name that shares most words with the wanted one; none if there is a tie or no name."""
    words = set(wanted.split("."))
    scored = sorted(((len(words & set(name.split("."))), name) for name in names), reverse=True)
    if not scored or (len(scored) > 1 and scored[0][0] == scored[1][0]):
        return None
    return scored[0][1]
