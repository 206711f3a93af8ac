"""A forward pass that hands over the activations of chosen sites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from actstore.ingest.models.sites import SiteSpec

if TYPE_CHECKING:
    from jaxtyping import Float32, Int64
    from torch import Tensor

    from actstore.ingest.models.load import Model


def forward(
    model: Model,
    ids: Int64[Tensor, "tree pos"],  # noqa: F722
    sites: Sequence[SiteSpec],
    take: Callable[[SiteSpec, Tensor], None],
) -> Float32[Tensor, "tree pos d_vocab"]:  # noqa: F722
    """Run the model once, with hooks on the chosen sites only.

    Args:
        ids: token ids, on the model's device; no more positions than its n_ctx.
        take: called during the pass with each site and its activations, float32 [tree, pos,
            d_model] or, for a pattern, [tree, head, query, key]. `take` must copy what it keeps and
            must not change its input.

    Returns:
        The logits.
    """
    import torch

    def hook(site: SiteSpec) -> Callable[..., None]:
        return lambda activations, hook: take(site, activations)

    with torch.no_grad():
        return model.bridge.run_with_hooks(ids, fwd_hooks=[(site.name, hook(site)) for site in sites])
