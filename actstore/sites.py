"""Resolve a caller's sites: short names, TransformerLens' names or keys, and families of layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

from actstore.advice import ingest_sites
from actstore.arrays.families import FAMILIES
from actstore.errors import BadInput, NotStored, nearest

if TYPE_CHECKING:
    from actstore.advice import Held

SITE = "resid_post.0"  # the default
Site = str | tuple[str, int]  # `resid_post.0`, `blocks.0.hook_resid_post` or TransformerLens' key ("resid_post", 0)
OF_A_BLOCK = re.compile(r"blocks\.(\d+)\.(?:attn\.)?hook_(\w+)")
SPELLINGS = "a site is spelled 'embed', 'resid_post.0', 'blocks.0.hook_resid_post' or ('resid_post', 0)"


def wanted(store: Held, run: str, site: Site | None, sites: Sequence[Site] | None) -> list[str]:
    """Names of the sites that a caller means; the run need not hold them.

    Args:
        site: one site; default: SITE.
        sites: several sites; a family (`resid_post`) stands for every layer of it that the run
            holds.

    Raises:
        BadInput: both site and sites are given, sites is empty, site is a family, or a name is no
            site's.
    """
    if sites is None:
        if isinstance(site, (list, tuple, set)) and not _is_key(site):
            raise BadInput(
                f"got site {site!r}; for X [n, n_sites, d_model] give sites={list(site)!r}, for X [n, d_model] one site"
            )
        name = SITE if site is None else _name(store, run, site)
        if len(layers := _layers(store, run, name)) > 1 or (layers and layers != [name]):
            raise BadInput(
                f"got site {name!r}, a family; run {run!r} holds {in_short(layers)} of it: give one of them, or "
                f"sites=[{name!r}] for X [n, {len(layers)}, d_model]"
            )
        return [name]
    if site is not None:
        raise BadInput(
            f"got site {site!r} and sites {sites!r}; give site for X [n, d_model], sites for [n, n_sites, d_model]"
        )
    if isinstance(sites, (str, set)) or not isinstance(sites, Iterable) or not (named := list(sites)):
        raise BadInput(f"got sites {sites!r}; give a list of sites, such as ['embed', 'resid_post.0'], or site for one")
    names = [_name(store, run, spelled) for spelled in named]
    return [layer for name in names for layer in _layers(store, run, name) or [name]]


def _is_key(site: Any) -> bool:
    """True for a key of TransformerLens' ActivationCache.

    Keys are ("resid_post", 0) or ("pattern", 0, "attn").
    """
    if not isinstance(site, tuple) or len(site) not in (2, 3) or not isinstance(site[0], str):
        return False
    layer = site[1]
    return layer.isdecimal() if isinstance(layer, str) else isinstance(layer, Integral) and layer is not True


def _name(store: Held, run: str, site: Any) -> str:
    if isinstance(site, str):
        return site
    if not _is_key(site):
        raise BadInput(f"got site {site!r}; {SPELLINGS}, and run {run!r} holds {in_short(store.sites(run))}")
    family, layer = site[0], int(site[1])
    n_layers = _n_layers(store, run)
    return f"{family}.{layer + n_layers if layer < 0 and n_layers else layer}"  # -1 is the last, as there


def _layers(store: Held, run: str, name: str) -> list[str]:
    """The sites of a family that a run holds; [] if the name is not a family."""
    return [held for held in store.sites(run) if held.partition(".")[0] == name] if name in FAMILIES else []


def _n_layers(store: Held, run: str) -> int | None:
    return store.sql(
        "select n_layers from runs join models using (weights_sha256) where run = $run", {"run": run}
    ).item()


def not_held(store: Held, run: str, site: str) -> NotStored:
    """The error for a site that the run does not hold: near names, and what would store it."""
    held, n_layers = store.sites(run), _n_layers(store, run)
    found = OF_A_BLOCK.fullmatch(site)
    short = f"{found[2]}.{found[1]}" if found else site.removeprefix("hook_")
    family, _, layer = short.partition(".")
    said, holds = f"run {run!r} holds no site {site!r}", f"it holds {in_short(held) or 'none'}"
    if family in FAMILIES and layer.isdecimal() and n_layers and int(layer) >= n_layers:
        return NotStored(f"{said}: its model has layers 0 to {n_layers - 1}; {holds}")
    if short in ("embed", *FAMILIES) or (family in FAMILIES and layer.isdecimal()):
        return NotStored(f"{said}; {holds}: add it with {ingest_sites(store, run, short)}")
    if "," in site:
        return NotStored(f"{said}; {holds}: for several give sites={site.replace(' ', '').split(',')}")
    if site in store.runs():
        return NotStored(f"{said}, which is a run; {holds}: name a site of it (site=…, --site)")
    if hint := nearest(short.lower(), [*held, "embed", *FAMILIES]):
        return NotStored(f"{said}{hint}; {holds}")
    return NotStored(f"{said}; {holds}: name one of them")


def by_family(names: Sequence[str]) -> list[str]:
    """Sites with the layers of one family together, by the first of each family."""
    families = list(dict.fromkeys(name.partition(".")[0] for name in names))
    return sorted(names, key=lambda name: families.index(name.partition(".")[0]))


def in_short(names: Sequence[str]) -> str:
    """`embed, resid_post.0 to resid_post.5`: three or more successive layers become a range."""
    parts: list[list[str]] = []
    for name in names:
        family, _, layer = name.partition(".")
        if parts and layer.isdecimal() and parts[-1][-1] == f"{family}.{int(layer) - 1}":
            parts[-1].append(name)
        else:
            parts.append([name])
    return ", ".join(f"{part[0]} to {part[-1]}" if len(part) > 2 else ", ".join(part) for part in parts)
