"""The sites of a model that can be stored, and the names that choose among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actstore.arrays.families import FAMILIES
from actstore.errors import BadInput, nearest
from actstore.ingest.models.config import ModelConfig

DEFAULT_SITES = ("embed", "resid_post")  # what the notebook probes


@dataclass(frozen=True)
class SiteSpec:
    """A place in the network.

    Attributes:
        name: TransformerLens name, `blocks.0.hook_resid_post`.
        short: `resid_post.0`.
        kind: `resid`, [tree, position, d_model], or `pattern`, [tree, head, query, key].
    """

    name: str
    short: str
    kind: str


def all_sites(config: ModelConfig) -> list[SiteSpec]:
    """Every site that can be stored, in the network's order."""
    sites = [SiteSpec("hook_embed", "embed", "resid")]
    for layer in range(config.n_layers):
        for family in ("resid_pre", "pattern", "resid_mid", "resid_post"):
            kind = "pattern" if family == "pattern" else "resid"
            sites.append(SiteSpec(f"blocks.{layer}.{FAMILIES[family]}", f"{family}.{layer}", kind))
    return sites


def site_specs(names: Sequence[str] | None, config: ModelConfig) -> list[SiteSpec]:
    """The sites with the given names, each once, in the network's order.

    Args:
        names: short (`resid_post.0`), TransformerLens' (`blocks.0.hook_resid_post`), or a family,
            which means every layer (`resid_post`). Default: `embed` and `resid_post`.

    Raises:
        BadInput: a site does not exist, or `names` is empty.
    """
    names = DEFAULT_SITES if names is None else names
    sites = all_sites(config)
    spellings = {site: (site.name, site.short, site.short.partition(".")[0]) for site in sites}
    known = {spelling for of_site in spellings.values() for spelling in of_site}
    for name in names:
        if name not in known:
            raise BadInput(f"no site {name!r}{nearest(name, sorted(known))}; {_what_exists(config)}")
    wanted = [site for site, of_site in spellings.items() if not set(names).isdisjoint(of_site)]
    if not wanted:
        raise BadInput(f"no site asked for; {_what_exists(config)}")
    return wanted


def _what_exists(config: ModelConfig) -> str:
    families = ", ".join(FAMILIES)
    there = (
        f"there are embed, and {families} of all or of one, resid_post.0 to resid_post.{config.n_layers - 1} (--sites)"
    )
    return f"of {config.n_layers} layers {there}"
