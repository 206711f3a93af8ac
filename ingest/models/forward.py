"""A forward pass that hands over the activations of chosen sites."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from actstore.errors import BadInput
from actstore.ingest.models.sites import SiteSpec

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float32, Int64
    from torch import Tensor

    from actstore.ingest.models.load import Model

Hooks = list[tuple[str, Callable[..., Any]]]
MID_TOLERANCE = 1e-3  # of the largest number: half precision rounds by half of it


@runtime_checkable
class Changing(Protocol):
    """Edits of the activations of one forward pass."""

    @property
    def sites(self) -> Iterable[str]:
        """TransformerLens' names of the edited sites."""
        ...

    def apply(self, site: str, activations: Tensor) -> Tensor:
        """The edited activations of a site, float32; changes them in place."""
        ...


def edited(changes: Changing) -> tuple[Hooks, Hooks]:
    """Hooks that edit a forward pass: those before the hooks that read sites, and those after them.

    TransformerLens 4 hooks `resid_mid` at the input of the MLP's norm, so that a change there does
    not reach the residual stream. Such an edit is made in `attn_out`, which the stream adds to
    `resid_pre`.
    """
    first: Hooks = []
    last: Hooks = []
    for site in changes.sites:
        prefix, _, name = site.rpartition(".")
        if name != "hook_resid_mid":
            first.append((site, _edit(changes, site)))
            continue
        before: dict[str, Tensor] = {}

        def keep(resid: Tensor, hook: object, before: dict[str, Tensor] = before) -> None:
            before["resid"] = resid

        def edit(out: Tensor, hook: object, site: str = site, before: dict[str, Tensor] = before) -> Tensor:
            resid = before["resid"].float()
            before["wanted"] = changes.apply(site, resid + out.float())
            return (before["wanted"] - resid).to(out.dtype)

        def look(resid: Tensor, hook: object, site: str = site, before: dict[str, Tensor] = before) -> None:
            wanted = before["wanted"]
            if float((resid.float() - wanted).abs().max()) > MID_TOLERANCE * float(wanted.abs().max()):
                raise BadInput(
                    f"got an edit at {site!r}, and in this architecture the residual stream there is not resid_pre plus attn_out; "
                    "edit resid_post of the layer before, or attn_out"
                )

        last += [(f"{prefix}.hook_resid_pre", keep), (f"{prefix}.hook_attn_out", edit), (site, look)]
    return first, last


def _edit(changes: Changing, site: str) -> Callable[..., Any]:
    def edit(activations: Tensor, hook: object) -> Tensor:
        return changes.apply(site, activations.float().clone()).to(activations.dtype)

    return edit


def forward(
    model: Model,
    ids: Int64[Tensor, "sequence pos"],  # noqa: F722
    sites: Sequence[SiteSpec],
    take: Callable[[SiteSpec, Tensor], None],
    lengths: Sequence[int] | np.ndarray | Tensor | None = None,
    changes: Changing | None = None,
) -> Float32[Tensor, "sequence pos d_vocab"]:  # noqa: F722
    """Run the model once, with hooks on the chosen sites only.

    Args:
        ids: token ids, on the model's device, padded on the right with any id; no more positions
            than the model's n_ctx.
        take: called during the pass with each site and its activations, float32 [sequence, pos,
            *row_shape] or, for a pattern, [sequence, head, query, key]. `take` must copy what it
            keeps and must not change its input.
        lengths: number of tokens of each sequence, without padding; default: every position is a
            token. Rows past the length mean nothing. A path-finding system is causal and knows its
            padding, so that it runs without a mask.
        changes: edits of the activations; `take` is given the edited ones.

    Returns:
        The logits.

    Raises:
        BadInput: a site has another shape than in the first forward pass; or the model has no edit
            of the residual stream between attention and MLP.
    """
    import torch

    n_sequences, n_positions = ids.shape

    def hook(site: SiteSpec) -> Callable[..., None]:
        is_pattern = site.kind == "pattern"
        wanted = (n_sequences, *site.row_shape, *2 * (n_positions,)) if is_pattern else (*ids.shape, *site.row_shape)

        def hand_over(activations: Tensor, hook: object) -> None:
            if tuple(activations.shape) != wanted:
                raise BadInput(
                    f"site {site.name!r} gave {list(activations.shape)}, and its first forward pass makes it {list(wanted)}; "
                    "a site has one shape in all batches: leave it out (--sites)"
                )
            take(site, activations.float())

        return hand_over

    first, last = ([], []) if changes is None else edited(changes)
    hooks = [*first, *((site.name, hook(site)) for site in sites), *last]
    with torch.no_grad():
        if model.task == "trees":
            return model.bridge.run_with_hooks(ids, fwd_hooks=hooks)
        mask = torch.ones_like(ids)
        if lengths is not None:
            of_each = torch.as_tensor(lengths).to(ids.device, non_blocking=True)
            mask = (torch.arange(n_positions, device=ids.device) < of_each[:, None]).long()
        logits = model.bridge.run_with_hooks(ids, attention_mask=mask, fwd_hooks=hooks)
    return logits.float()


def activations(
    model: Model,
    ids: Int64[Tensor, "sequence pos"],  # noqa: F722
    sites: Sequence[SiteSpec],
    take: Callable[[SiteSpec, Tensor], None],
    lengths: Sequence[int] | np.ndarray | Tensor | None = None,
) -> None:
    """Run the model once, but only as far as the last of the chosen sites.

    What `take` is given equals, bit for bit, what `forward` gives it. Without sites, nothing runs.

    Args:
        ids, take, lengths: see `forward`.
        sites: each is of one hook, which fires once in a pass.

    Raises:
        BadInput: see `forward`.
    """
    left = {site.name for site in sites}

    def take_and_stop(site: SiteSpec, found: Tensor) -> None:
        take(site, found)
        left.discard(site.name)
        if not left:
            raise _AllTaken

    if left:
        with suppress(_AllTaken):
            forward(model, ids, sites, take_and_stop, lengths)


class _AllTaken(Exception):
    """Ends a forward pass after the last site; TransformerLens removes its hooks."""
