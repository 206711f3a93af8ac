"""The study `probe`: at which sites can a linear probe read a label of your own?

A query yields `token_id`, `label` (text, whole numbers, or true and false) and, if the sequences'
own split is not meant, `split`. Tokens may be of any dataset. The query runs in the session of the
run. Probes, shuffled labels, Hewitt and Liang's control task and random directions are those of the
study `probes`, see study.py and fit.py. If the run holds `embed`, the same probe of the embedding
is a further control, which reads the token and nothing around it.

The baselines are the commonest training label and the user's queries, which yield `token_id` and
`guess`. Intervals are over test documents, where sequences know their document, since two sequences
of one document are not independent. Otherwise intervals are over test sequences; trees are
sequences. Sign flips of each document's or sequence's sum test whether a probe exceeds the best
baseline, with Holm's correction over all sites.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from actstore.errors import BadInput
from actstore.intervals import N_RESAMPLES
from actstore.named import NAME as NAMES
from actstore.queries.probes.asked import Asked
from actstore.queries.probes.fit import MAX_ITER, TOL, C, Sides, fit_all
from actstore.queries.probes.labelled import Labelled, files_in, guesses, labelled, parameters, sql_of
from actstore.queries.probes.own_figures import EMBED, as_frame, sentence
from actstore.queries.probes.own_figures import plot as plot
from actstore.queries.probes.study import probe_site, sites_to_probe
from actstore.queries.study import Answer, Progress, Test, adjusted, result_rows, test_rows

if TYPE_CHECKING:
    from actstore.store import Store

NAME = "probe"
KINDS, MORE = ("resid", "vector"), ("heads",)  # of sites: probed by default, and if named


def study(
    store: Store,
    run: str,
    seed: int,
    progress: Progress,
    query: str | Path | None = None,
    params: Mapping[str, Any] | None = None,
    sites: str | Sequence[str] | None = None,
    baselines: str | Path | Sequence[str | Path] | None = None,
    label: str = "label",
    max_iter: int = MAX_ITER,
) -> Answer:
    """Probe sites of a run for the labels of a query.

    Memory is three copies of one site's rows, float32.

    Args:
        store: an open store.
        run: name of the run.
        seed: seed of the shuffled labels, control labels and random directions; fits are
            deterministic.
        progress: called with (sites done, sites in all, the site just done).
        query: a SELECT that yields token_id, label and, where wanted, split; or the path of an .sql
            file. The session of the run shows it only the run's rows. $run and $dataset have the
            run's values.
        params: values of the query's other parameters.
        sites: names of sites, or of a family for all its layers; default: every site with a vector
            per token. The heads of a site that is named are put side by side.
        baselines: paths of .sql files, see labelled.guesses.
        label: what the label is called in `results` and in the names of directions,
            run/site/label=class.
        max_iter: largest number of iterations of a fit.

    Raises:
        BadInput: there is no query, or probes cannot use its rows (see labelled.labelled), or a
            baseline is invalid.
        NotStored: the run does not hold a site.
    """
    if not query:
        raise BadInput(
            "the study 'probe' lacks its query; give --query \"select token_id, … as label from tokens\", or --query FILE.sql"
        )
    if not isinstance(max_iter, int) or max_iter < 1:
        raise BadInput(f"got max_iter {max_iter!r}; it is a number of iterations, 1 or more (default {MAX_ITER})")
    if not NAMES.fullmatch(str(label)):
        raise BadInput(f"got {label!r} for the label's name; take letters, digits and . _ = , + -")
    sql, name = sql_of(query), str(label)
    used = parameters(store, run, sql, params or {})
    probed = sites_to_probe(store, run, sites, KINDS, MORE)
    rows = labelled(store, run, sql, used)
    of_run = parameters(store, run, "$run $dataset", params or {})
    guessed, guessers = guesses(store, run, files_in(baselines), rows, of_run)
    asked = _asked(rows, name, guessed)
    if EMBED in store.sites(run):
        asked = replace(asked, embedding=_embedding(_vectors(store, run, EMBED, rows), asked, name, max_iter))
    found: list[dict[str, Any]] = []
    tests: list[Test] = []
    for done, site in enumerate(probed, start=1):
        X = _vectors(store, run, site, rows)
        here = replace(asked, embedding=None) if site == EMBED else asked
        its_rows, its_tests = probe_site(X, here, {"run": run, "site": site}, seed, max_iter)
        found += its_rows
        tests += its_tests
        progress(done, len(probed), site)
    kept = {"query": sql, "params": used, "baselines": guessers, "classes": rows.classes.tolist()}
    kept |= {"n_train": int(rows.train.sum()), "n_train_units": len(np.unique(rows.units[rows.train]))}
    kept |= {
        "units_are": rows.units_are,
        "n_test_units": len(np.unique(asked.test_sequences)),
        "data_xxh3": _hash(rows),
    }
    kept |= {"C": C, "tol": TOL, "max_iter": max_iter, "n_resamples": N_RESAMPLES}
    corrected = adjusted(tests)
    results = result_rows(
        [*found, *test_rows(corrected)],
        study=NAME,
        run=run,
        query=sql,
        params=kept,
        snapshot=store.snapshot,
        seed=seed,
    )
    return Answer(NAME, as_frame(results), results, sentence(results, corrected), corrected)


def _asked(rows: Labelled, name: str, guessed: dict[str, np.ndarray]) -> Asked:
    return Asked(
        tokens=rows.tokens,
        sequences=rows.units,
        train=rows.train,
        labels={name: rows.y},
        guessed={name: guessed},
        n_classes={name: len(np.unique(rows.y[rows.train]))},
        names={name: rows.classes},
        baseline="its best baseline",
    )


def _vectors(store: Store, run: str, site: str, rows: Labelled) -> np.ndarray:
    """float32 [n, d], a site's activations; heads lie side by side."""
    X = store.read(rows.tokens["token_id"].to_numpy(), run, site)[0]
    return X.reshape(len(X), -1)


def _embedding(X: np.ndarray, asked: Asked, name: str, max_iter: int) -> np.ndarray:
    """bool [n_test], test rows that a probe of the embedding gets right."""
    whitened = Sides.whitened(X, asked.train)
    return fit_all([(whitened, asked.labels[name])], asked.train, max_iter)[0].right


def _hash(rows: Labelled) -> str:
    """xxh3-128, hexadecimal, of the probes' rows: token ids, classes, split."""
    digest = xxhash.xxh3_128(rows.tokens["token_id"].to_numpy().astype(np.int64).tobytes())
    digest.update(rows.y.tobytes())
    digest.update("\0".join(rows.classes.tolist()).encode())
    digest.update(rows.train.tobytes())
    return digest.hexdigest()
