"""A forward pass that hands over the activations of chosen sites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from actstore.errors import BadInput
from actstore.ingest.models.sites import SiteSpec

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float32, Int64
    from torch import Tensor

    from actstore.ingest.models.load import Model


def forward(
    model: Model,
    ids: Int64[Tensor, "sequence pos"],  # noqa: F722
    sites: Sequence[SiteSpec],
    take: Callable[[SiteSpec, Tensor], None],
    lengths: Sequence[int] | np.ndarray | Tensor | None = None,
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

    Returns:
        The logits.

    Raises:
        BadInput: a site has another shape than in the first forward pass.
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

    hooks = [(site.name, hook(site)) for site in sites]
    with torch.no_grad():
        if model.task == "trees":
            return model.bridge.run_with_hooks(ids, fwd_hooks=hooks)
        mask = torch.ones_like(ids)
        if lengths is not None:
            of_each = torch.as_tensor(lengths, device=ids.device)
            mask = (torch.arange(n_positions, device=ids.device) < of_each[:, None]).long()
        logits = model.bridge.run_with_hooks(ids, attention_mask=mask, fwd_hooks=hooks)
    return logits.float()
