"""The sites of a model that can be stored, and the names that choose among them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actstore.arrays.families import FAMILIES, MORE_FAMILIES
from actstore.errors import BadInput, nearest
from actstore.ingest.models.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens.model_bridge import TransformerBridge

DEFAULT_SITES = ("embed", "resid_post")  # what the notebook probes
WHOLE = {"embed": "hook_embed", "pos_embed": "hook_pos_embed"}  # sites that a network has once
RESIDUAL = ("embed", "resid_pre", "resid_mid", "resid_post")


@dataclass(frozen=True)
class SiteSpec:
    """A place in the network.

    Attributes:
        name: TransformerLens name, `blocks.0.hook_resid_post`.
        short: `resid_post.0`; the name itself, where there is no shorter one.
        kind: `resid` or `vector`, [sequence, position, d]; `heads`, [sequence, position, head,
            d_head]; or `pattern`, [sequence, head, query, key].
        axes: names of one row's axes, such as ("d_model",) or ("head", "key").
        row_shape: sizes of one row's axes, without the key of a pattern, which is as long as the
            longest sequence.
    """

    name: str
    short: str
    kind: str
    axes: tuple[str, ...] = ("d_model",)
    row_shape: tuple[int, ...] = ()

    def row(self, n_positions: int) -> tuple[int, ...]:
        """The shape of one row of an array whose longest sequence has `n_positions` tokens."""
        return (*self.row_shape, n_positions) if self.kind == "pattern" else self.row_shape


def all_sites(config: ModelConfig) -> list[SiteSpec]:
    """The sites of a path-finding system that need no forward pass, in the network's order."""
    resid = ("resid", ("d_model",), (config.d_model,))
    sites = [SiteSpec("hook_embed", "embed", *resid)]
    for layer in range(config.n_layers):
        for family in ("resid_pre", "pattern", "resid_mid", "resid_post"):
            about = ("pattern", ("head", "key"), (config.n_heads,)) if family == "pattern" else resid
            sites.append(SiteSpec(f"blocks.{layer}.{FAMILIES[family]}", f"{family}.{layer}", *about))
    return sites


def site_specs(
    names: Sequence[str] | None, config: ModelConfig, hooks: Callable[[], Hooks] | None = None
) -> list[SiteSpec]:
    """The sites of a path-finding system with the given names, each once, in the network's order.

    Args:
        names: short (`resid_post.0`), TransformerLens' (`blocks.0.hook_resid_post`), or a family,
            which means every layer (`resid_post`). Default: `embed` and `resid_post`.
        hooks: gives the model's hooks where one beyond those of `all_sites` is named; default:
            those of a random model of the configuration.

    Raises:
        BadInput: a site does not exist, or `names` is empty.
    """
    names = DEFAULT_SITES if names is None else names
    sites = all_sites(config)
    spellings = {site: (site.name, site.short, site.short.partition(".")[0]) for site in sites}
    known = {spelling for of_site in spellings.values() for spelling in of_site}
    for name in names:
        if name in known:
            continue
        if "hook_" in name or name.partition(".")[0] in MORE_FAMILIES:
            from actstore.ingest.models.native import build

            return (hooks() if hooks else Hooks(build(config, seed=0))).chosen(names)
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


def bridge_sites(bridge: TransformerBridge) -> list[SiteSpec]:
    """Every hook of a model that can be stored, in the network's order; runs a forward pass."""
    return list(Hooks(bridge).sites.values())


class Hooks:
    """What the hooks of a model give, as one forward pass over two short sequences shows.

    Attributes:
        sites: by name, those that can be stored, in the order in which they fire.
        refused: by name, why a hook cannot be stored.
        same: by name, the other names of the same hook.
        last: float [2, pos, d_model] and [2, pos, d_vocab]: the last layer's residual stream and
            the logits; None where the model has none.
    """

    def __init__(self, bridge: TransformerBridge) -> None:
        self.sites: dict[str, SiteSpec] = {}
        self.refused: dict[str, str] = {}
        self._n_layers = int(bridge.cfg.n_layers)
        points = bridge.hook_dict
        fired, off, logits = _fire(bridge)
        held = fired.get(f"blocks.{bridge.cfg.n_layers - 1}.hook_resid_post", [])
        self.last = (held[0], logits) if len(held) == 1 and logits is not None else None
        for name in [*fired, *(name for name in points if name not in fired)]:
            site = off.get(name) or _spec(name, fired.get(name, []), bridge.cfg, _n_positions(bridge))
            if isinstance(site, SiteSpec):
                self.sites[name] = site
            else:
                self.refused[name] = site
        by_point: dict[int, list[str]] = {}
        for name in self.sites:
            by_point.setdefault(id(points[name]), []).append(name)
        self.same = {name: [other for other in names if other != name] for names in by_point.values() for name in names}

    def listed(self) -> list[SiteSpec]:
        """Each hook once, under the name that has a short form, if any."""
        return [
            site
            for name, site in self.sites.items()
            if _is_first(name, site, [self.sites[other] for other in self.same[name]])
        ]

    def chosen(self, names: Sequence[str] | None) -> list[SiteSpec]:
        """See `chosen`."""
        by_family: dict[str, list[SiteSpec]] = {}
        for site in self.sites.values():
            if site.short != site.name:
                by_family.setdefault(site.short, []).append(site)
                if "." in site.short:
                    by_family.setdefault(site.short.partition(".")[0], []).append(site)
        if names is None:
            names = [name for name in DEFAULT_SITES if name in by_family]
        wanted: set[str] = set()
        for name in names:
            if name in self.sites:
                wanted.add(name)
            elif name in by_family:
                wanted.update(site.name for site in by_family[name])
            else:
                raise BadInput(self._why_not(name, by_family))
        if not wanted:
            raise BadInput(f"no site asked for; {_some(self._n_layers, by_family)}")
        return [site for name, site in self.sites.items() if name in wanted]

    def _why_not(self, name: str, by_family: Iterable[str]) -> str:
        spelled = spelled_out(name)
        if spelled in self.refused:
            return f"no site {name!r}: {self.refused[spelled]}; {_some(self._n_layers, by_family)}"
        return f"no site {name!r}{nearest(name, sorted({*self.sites, *by_family}))}; {_some(self._n_layers, by_family)}"


def spelled_out(name: str) -> str:
    """TransformerLens' name of a short one: `z.3` → `blocks.3.attn.hook_z`; any other as it is."""
    family, _, layer = name.partition(".")
    within = {**FAMILIES, **MORE_FAMILIES}.get(family)
    return f"blocks.{layer}.{within}" if within and layer.isdecimal() else WHOLE.get(name, name)


def short_of(name: str) -> str:
    """The short form of a hook's name, which is the name itself where there is none."""
    for short, whole in WHOLE.items():
        if name == whole:
            return short
    blocks, _, rest = name.partition(".")
    layer, _, within = rest.partition(".")
    if blocks == "blocks" and layer.isdecimal():
        for family, hook in {**FAMILIES, **MORE_FAMILIES}.items():
            if within == hook:
                return f"{family}.{layer}"
    return name


def _some(n_layers: int, by_family: Iterable[str]) -> str:
    families = [name for name in by_family if "." not in name]
    return (
        f"of {n_layers} layers there are {', '.join(families) or 'no families'} of all or of one (resid_post.0), and any hook "
        "that `actstore models sites MODEL` lists (--sites)"
    )


def _is_first(name: str, site: SiteSpec, others: Sequence[SiteSpec]) -> bool:
    """True if a hook's name is the one to list, among all names of the hook."""
    rank = [(other.short == other.name, len(other.name), other.name) for other in others]
    return all((site.short == name, len(name), name) < other for other in rank)


def _n_positions(bridge: TransformerBridge) -> int:
    """A length that is no other size of the model, so that the axis of positions is known by it."""
    sizes = {value for value in vars(bridge.cfg).values() if type(value) is int} | {2}
    found = next(n for n in range(3, len(sizes) + 4) if n not in sizes)
    return min(found, int(bridge.cfg.n_ctx))


def _fire(bridge: TransformerBridge) -> tuple[dict[str, list[Tensor]], dict[str, str], Tensor | None]:
    """One forward pass.

    Returns:
        What each hook was given, in the order in which hooks fire; why hooks are switched off; the
        logits.
    """
    import torch

    fired: dict[str, list[Any]] = {}

    def note(name: str) -> Any:
        def hook(activation: Any, hook: Any) -> None:
            fired.setdefault(name, []).append(activation)

        return hook

    hooks, off = [], {}
    for name, point in bridge.hook_dict.items():
        try:
            bridge.check_hooks_to_add(point, name, note(name))
        except ValueError as error:  # the hook would never fire
            off[name] = f"the hook is switched off ({error})"
            continue
        hooks.append((name, note(name)))
    n = _n_positions(bridge)
    device = next(bridge.parameters()).device
    ids = (torch.arange(2 * n, device=device) % int(bridge.cfg.d_vocab)).reshape(2, n)
    with torch.no_grad():
        logits = bridge.run_with_hooks(ids, attention_mask=torch.ones_like(ids), fwd_hooks=hooks)
    is_logits = isinstance(logits, torch.Tensor) and logits.shape[:2] == (2, n)
    return fired, off, logits if is_logits else None


def _spec(name: str, fired: Sequence[Any], cfg: Any, n: int) -> SiteSpec | str:
    """The site of a hook that was given activations of `n` positions, or why it is none."""
    import torch

    if not fired:
        return "the hook does not fire in a forward pass"
    if len(fired) > 1:
        return f"the hook fires {len(fired)} times in a forward pass, and a site is stored once"
    (activation,) = fired
    if not isinstance(activation, torch.Tensor) or not activation.is_floating_point():
        kind = str(activation.dtype).removeprefix("torch.") if isinstance(activation, torch.Tensor) else "no tensor"
        return f"the hook gives {kind}, and a site is numbers of floating point"
    shape = tuple(activation.shape)
    short = short_of(name)
    if len(shape) == 4 and shape[0] == 2 and shape[2:] == (n, n):
        return SiteSpec(name, short, "pattern", ("head", "key"), (shape[1],))
    if len(shape) == 3 and shape[:2] == (2, n):
        kind = "resid" if short.partition(".")[0] in RESIDUAL else "vector"
        return SiteSpec(name, short, kind, (_axis(name, shape[2], cfg),), shape[2:])
    if len(shape) == 4 and shape[:2] == (2, n):
        last = "d_model" if shape[3] == cfg.d_model != cfg.d_head else "d_head"
        return SiteSpec(name, short, "heads", ("head", last), shape[2:])
    return f"for 2 sequences of {n} tokens the hook gives {list(shape)}, and a site has a row per token, [2, {n}, …]"


def _axis(name: str, size: int, cfg: Any) -> str:
    """The name of a vector's axis, by its size; the hook's name decides between equal sizes."""
    axes = ["d_model", "d_mlp", "d_vocab"]
    if "unembed" in name:
        axes.reverse()
    elif name.endswith(
        ("mlp.hook_pre", "mlp.hook_post", "hook_pre_linear", "in.hook_out", "gate.hook_out", "out.hook_in")
    ):
        axes = ["d_mlp", "d_model", "d_vocab"]
    return next((axis for axis in axes if getattr(cfg, axis, None) == size), "width")
