"""Train an SAE of SAELens 6 a hundred steps from a dataset that `actstore export` wrote; see `make saelens`.

    python tests/saelens/train.py FOLDER

It imports nothing of actstore. It fails unless the SAE explains more of the activations than before.
"""

from __future__ import annotations

import sys

import datasets
import torch
from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.sae_trainer import SAETrainer

STEPS, TOKENS_PER_STEP = 100, 512


def main(folder: str) -> None:
    features = datasets.load_from_disk(folder).features
    hook = next(name for name in features if name not in ("token_ids", "store_token_ids"))
    context, d_in = features[hook].shape
    store = ActivationsStore(
        model=None,
        dataset=None,
        cached_activations_path=folder,
        streaming=False,
        hook_name=hook,
        hook_head_index=None,
        context_size=context,
        d_in=d_in,
        n_batches_in_buffer=64,
        total_training_tokens=STEPS * TOKENS_PER_STEP,
        store_batch_size_prompts=8,
        train_batch_size_tokens=TOKENS_PER_STEP,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
    )
    torch.manual_seed(0)
    sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=d_in, d_sae=4 * d_in, l1_coefficient=0.01))
    held_out = next(store)
    before = unexplained(sae, held_out)
    config = SAETrainerConfig(
        total_training_samples=STEPS * TOKENS_PER_STEP, train_batch_size_samples=TOKENS_PER_STEP, lr=1e-3, lr_end=1e-4
    )
    trainer = SAETrainer(config, sae, store)
    trained = trainer.fit()
    after = unexplained(trained, held_out)
    print(
        f"{hook}: [{context}, {d_in}]; {trainer.n_training_steps} steps; variance unexplained {before:.3f}, then {after:.3f}"
    )
    if not (trainer.n_training_steps == STEPS and after < before / 2):
        sys.exit("the SAE learnt nothing")


@torch.no_grad()
def unexplained(sae: StandardTrainingSAE, X: torch.Tensor) -> float:
    """Share of the variance of X, float32 [n, d_in], that the SAE's reconstruction leaves."""
    return float((sae(X) - X).pow(2).sum() / (X - X.mean(0)).pow(2).sum())


if __name__ == "__main__":
    main(sys.argv[1])
