"""A tour of actstore, a marimo notebook: `marimo edit queries/notebooks/tour.py`.

`make notebooks` makes tour.ipynb from this file.
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(app_title="A tour of actstore")


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    # A tour of actstore

    A small transformer finds paths in trees. Its input lists the edges of a tree, and then names a
    goal and the root. Its answer is the path from the root down to the goal, node by node. What does
    it hold in mind on the way, and where?

    A store answers such questions without another run of the model. It holds the residual stream at
    every token (128 numbers after each layer), and a table that says what each token means. Each
    section of this tour asks one question, and shows one way to read a store.

    The tour reads the store that `make demo` makes, and runs in the folder that holds it:

        actstore ingest demo.act --model reproduction --trees 2000
    """)
    return


@app.cell(hide_code=True)
def _():
    import marimo as mo

    return (mo,)


@app.cell
def _():
    import matplotlib.pyplot as plt
    import numpy as np
    import polars as pl
    import torch
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    import actstore
    from actstore import queries
    from actstore.intervals import over_trees, share
    from actstore.queries import figures
    from actstore.queries.show import plot_tree

    plt.rcParams.update({**figures.STYLE, "grid.color": "0.9"})
    store = actstore.Store("demo.act").of("reproduction")  # this run's rows alone, whatever else is stored
    ENDS = ["value", "low", "high"]  # a share and its 95 % interval
    return (
        ENDS,
        LogisticRegression,
        PCA,
        StandardScaler,
        actstore,
        figures,
        np,
        over_trees,
        pl,
        plot_tree,
        queries,
        share,
        store,
        torch,
    )


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## What does the model see, and what does it answer?

    Here is tree 1. The model sees its tokens one after another. `source →target` is an edge, and the
    edges are listed in no order. A separator `,` stands between two edges. A bar `|` ends the list.
    The goal, a colon and the root follow. Then come the steps of the path, which the model must write.
    """)
    return


@app.cell
def _(store):
    tokens = store.sql("select token::varchar as token, role from tokens where tree_id = 1 order by position")
    " ".join(tokens["token"])
    return


@app.cell
def _(plot_tree, store):
    plot_tree(store, 1)
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## How often is the answer right?

    Every tree, edge, token and answer is a row of a table. `store.sql` runs a query of DuckDB and
    returns a frame of polars. Here the query counts right answers by the length of the path.
    """)
    return


@app.cell
def _(ENDS, figures, pl, share, store):
    by_depth = store.sql("""
        select depth, count(*) as trees, count(*) filter (greedy_right) as right
        from outcomes join trees using (tree_id)
        group by depth order by depth
    """)
    right = [(n_right / n, *share(n_right, n)) for _, n, n_right in by_depth.iter_rows()]

    accuracy, (_axis,) = figures.panels(1, 1.8)
    figures.points(_axis, by_depth["depth"], pl.DataFrame(right, ENDS, orient="row"), "whole path right")
    figures.percents(_axis, 40)
    _axis.set_xticks(by_depth["depth"], [f"{depth}\n{n}" for depth, n, _ in by_depth.iter_rows()])
    _axis.set_xlabel("steps of the path; below, how many trees")
    _axis.set_ylabel("right (%)")
    figures.heading(
        accuracy, "Is the whole path right?", f"{by_depth['trees'].sum():,} trees; bars are exact 95 % intervals"
    )
    accuracy
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    The model hardly errs. The bars of the longest paths are long because few trees have such paths,
    and not because the model fails there.

    ## What does an edge's token know?

    A query that yields `token_id` names tokens, and `store.read` returns what the model held at these
    tokens. Row i of `X` belongs to row i of `rows`, whatever the order, filters and joins.
    `store.explain` says before a read what the read costs.
    """)
    return


@app.cell
def _(store):
    EDGES = "select token_id, tree_id, source, split from edge_targets using sample reservoir(6000) repeatable (0)"
    sites = store.sites("reproduction")
    str(store.explain(EDGES, site="resid_post.0"))
    return EDGES, sites


@app.cell
def _(EDGES, sites, store):
    X, rows = store.read(EDGES, sites=sites)
    rows.head(3)  # X is float32 [row, site, 128]
    return X, rows


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    These tokens are the targets of edges: at `→7`, say, the model has read `3 →7`. Does the token `→7`
    know that its source is 3? A linear probe is fitted to say so, once per site: the embedding
    (`embed`), and the stream after each layer. It is tested on trees that it was not fitted on.
    """)
    return


@app.cell
def _(
    ENDS,
    LogisticRegression,
    StandardScaler,
    X,
    figures,
    over_trees,
    pl,
    rows,
    sites,
):
    train, source = (rows["split"] == "train").to_numpy(), rows["source"].to_numpy()
    trees = rows["tree_id"].to_numpy()[~train]
    read = []
    for _place in range(len(sites)):
        _x = StandardScaler().fit_transform(X[:, _place])
        _hit = LogisticRegression(max_iter=100).fit(_x[train], source[train]).predict(_x[~train]) == source[~train]
        read.append((_hit.mean(), *over_trees(_hit, trees)))

    probes, (_axis,) = figures.panels(1, 1.8)
    figures.points(_axis, range(len(sites)), pl.DataFrame(read, ENDS, orient="row"), "probe")
    _axis.axhline(100 / 16, color=figures.GREY, linestyle=":", label="chance, 1 of 16 nodes")
    figures.percents(_axis)
    figures.by_site(_axis, sites)
    _axis.set_ylabel("source right (%)")
    figures.legend(probes, _axis)
    figures.heading(
        probes,
        "Can the source be read at the target?",
        f"{len(trees):,} edges of {len(set(trees)):,} test trees; bars are 95 % intervals over trees",
    )
    probes
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    At the embedding the token knows only its own name, and the probe guesses. After layer 0 the source
    is there: the first layer brings the two ends of an edge together. This is one probe with one
    control. `actstore study demo.act probes` has more of them, and tests each difference.

    ## How long are the vectors?

    Inside SQL, `act(token_id, run, site)` is the vector of a token, and `norm`, `dot`, `cosine` and
    `project` take it as an argument. The query below measures every token of tree 1. A large query is
    best filtered and limited in a subquery, so that only the vectors of its rows are read.
    """)
    return


@app.cell
def _(figures, store):
    norms = store.sql("""
        select token::varchar as token, norm(act(token_id, 'reproduction', 'embed')) as embed,
               norm(act(token_id, 'reproduction', 'resid_post.0')) as "after layer 0",
               norm(act(token_id, 'reproduction', 'resid_post.5')) as "after layer 5"
        from (select token_id, token, position from tokens where tree_id = 1)
        order by position
    """)

    lengths, (_axis,) = figures.panels(1, 1.7, width=figures.PAGE)
    for _turn, _site in enumerate(norms.columns[1:]):
        _axis.plot(norms[_site], f"-{figures.MARKERS[_turn]}", color=figures.COLOURS[_turn], label=_site)
    _axis.set_xticks(range(len(norms)), norms["token"], rotation=90, fontsize=6)
    _axis.set_ylim(0)
    _axis.set_ylabel("length of the vector")
    figures.legend(lengths, _axis)
    figures.heading(lengths, "How long is the stream at each token?", "tree 1, in the order of its tokens")
    lengths
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    The embedding is short beside what the layers add. After layer 0, sources and separators are long,
    and targets are short.

    ## Do two edges of the same node look alike?

    The table macro `activations(run, site)` is the table of tokens with the vector as a column `x`. A
    join of it with itself makes pairs. The query compares the targets of two edges that leave the same
    node with those that leave different nodes of the same tree.
    """)
    return


@app.cell
def _(figures, np, store):
    pairs = store.sql("""
        with targets as (
            select tree_id, token_id, source, x from activations('reproduction', 'resid_post.0')
            join (select token_id, source from edge_targets where tree_id < 20) using (token_id)
        )
        select a.source = b.source as same_source, cosine(a.x, b.x) as cosine
        from targets a join targets b on a.tree_id = b.tree_id and a.token_id < b.token_id
        order by a.token_id, b.token_id
    """)

    alike, (_axis,) = figures.panels(1, 1.6)
    for _same, _colour in ((False, figures.COLOURS[0]), (True, figures.COLOURS[1])):
        _cosines = pairs.filter(same_source=_same)["cosine"]
        _name = f"from {'the same node' if _same else 'different nodes'}, {len(_cosines):,} pairs"
        _axis.hist(
            _cosines,
            np.arange(-0.3, 1.01, 0.05),
            density=True,
            histtype="stepfilled",
            alpha=0.6,
            color=_colour,
            label=_name,
        )
    _axis.set_xlabel("cosine")
    _axis.set_ylabel("density")
    figures.legend(alike, _axis)
    figures.heading(
        alike, "How alike are the targets of two edges?", "after layer 0; pairs of edges within each of 20 trees"
    )
    alike
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    The targets of two edges of one node point in similar directions, and those of other edges do not.

    Many questions have a name already: `actstore query demo.act` lists them. The query `nearest` finds the
    tokens whose vectors are nearest to a given one, here to the first target of tree 1:
    """)
    return


@app.cell
def _(queries, store):
    first = store.sql("select token_id from edge_targets where tree_id = 1 order by token_id limit 1").item()
    nearest = queries.load("nearest").sql
    nearest_rows = store.sql(nearest, {"run": "reproduction", "site": "resid_post.0", "token_id": first, "n": 50})
    nearest_rows.select("rank", "tree_id", "position", "token", "role", "cosine").head(3)
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## When does the model know its first step?

    `logit_lens(token_id, run, site)` gives the answer that the model would write if it stopped after a
    layer: the stored stream goes through the final LayerNorm and the unembedding. The model does not
    run. The query asks at the root token, where the first step is written.
    """)
    return


@app.cell
def _(ENDS, figures, np, pl, share, sites, store):
    vocabulary = store.sql("select vocabulary from models")["vocabulary"][0].to_list()
    FIRST_STEPS = "select token_id, target from predictions where step = 0 and tree_id < 500 order by token_id"
    answer = store.sql(FIRST_STEPS)["target"].cast(str).to_numpy()
    lens = []
    for _site in sites:
        _logits = store.sql(f"select logit_lens(token_id, 'reproduction', '{_site}') as logits from ({FIRST_STEPS})")
        _said = np.array(vocabulary)[_logits["logits"].to_numpy().argmax(axis=1)]
        _n_right = int((_said == answer).sum())
        lens.append((_n_right / len(answer), *share(_n_right, len(answer))))

    guess = store.sql("""
        select avg(1 / children) from (
            select count(*) as children from edges where source_depth = 0 and tree_id < 500 group by tree_id
        )
    """).item()

    known, (_axis,) = figures.panels(1, 1.8)
    figures.points(_axis, range(len(sites)), pl.DataFrame(lens, ENDS, orient="row"), "logit lens")
    _axis.axhline(100 * guess, color=figures.GREY, linestyle=":", label="a guess among the root's children")
    figures.percents(_axis)
    figures.by_site(_axis, sites)
    _axis.set_ylabel("first step right (%)")
    figures.legend(known, _axis)
    figures.heading(known, "When is the first step known?", f"{len(answer):,} trees; bars are exact 95 % intervals")
    known
    return (vocabulary,)


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    After layers 1 and 2 the lens is right about as often as a guess among the root's children (the
    dotted line). Layers 3 to 5 decide between the children. The notebook `circuit` asks how.

    ## What shape have these vectors?

    `store.scan` is a lazy frame of polars: tokens, edges and trees with a column `x`. Filters and
    selections reach the store, so rows that are filtered out are never read. The cell takes the targets
    of edges in deep trees, and projects their vectors on the two directions in which these vary most.
    """)
    return


@app.cell
def _(PCA, figures, pl, store):
    lazy = store.scan(site="resid_post.0")
    deep = (
        lazy.filter((pl.col("role") == "edge_target") & (pl.col("depth") >= 6))
        .select("tree_id", "source", "x")
        .collect()
    )
    plane = PCA(2, random_state=0).fit_transform(deep["x"].to_numpy())

    shape, (_axis,) = figures.panels(1, 2.8)
    _axis.grid(False)
    _axis.scatter(*plane.T, s=2, color="0.85", label="other sources")
    for _turn, _node in enumerate((0, 5, 10, 15)):
        _of = (deep["source"] == _node).to_numpy()
        _axis.scatter(
            *plane[_of].T, s=7, marker=figures.MARKERS[_turn], color=figures.COLOURS[_turn], label=f"source {_node}"
        )
    _axis.set_xlabel("first principal component")
    _axis.set_ylabel("second")
    figures.legend(shape, _axis)
    figures.heading(shape, "Targets by the source of their edge", f"{len(deep):,} tokens after layer 0")
    shape
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    Targets gather by the source of their edge, though the names that the tokens carry are the targets'.

    ## Can a network train on a store?

    `store.batches` gives shuffled batches of tensors, in an order that depends only on the seed. They
    need not fit in memory, a DataLoader takes them, and training can resume at any batch. Here a linear
    probe for the source trains by gradient descent.
    """)
    return


@app.cell
def _(X, figures, np, store, torch):
    torch.manual_seed(0)
    batches = store.batches(
        "select token_id, source from edge_targets where split = 'train'", site="resid_post.0", batch_size=256, seed=0
    )
    linear = torch.nn.Linear(X.shape[2], 16)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=1e-2)
    losses = []
    for _epoch in range(3):
        batches.set_epoch(_epoch)
        for _x, _columns in batches:
            _loss = torch.nn.functional.cross_entropy(linear(_x), _columns["source"].long())
            optimizer.zero_grad()
            _loss.backward()
            optimizer.step()
            losses.append(_loss.item())

    X_test, test = store.read(
        "select token_id, source from edge_targets where split = 'test'", site="resid_post.0", out="torch"
    )
    with torch.no_grad():
        tested = (linear(X_test).argmax(1).numpy() == test["source"].to_numpy()).mean()

    training, (_axis,) = figures.panels(1, 1.6)
    _axis.plot(range(1, len(losses) + 1), losses, color=figures.COLOURS[0])
    _axis.axhline(np.log(16), color=figures.GREY, linestyle=":", label="an even guess")
    _axis.set_xscale("log")
    _axis.minorticks_off()
    _axis.set_xticks([1, 10, 100], ["1", "10", "100"])
    _axis.set_ylim(0)
    _axis.set_xlabel("batch of 256 rows, on a scale of logarithms")
    _axis.set_ylabel("loss (nats)")
    figures.legend(training, _axis)
    figures.heading(
        training, "A probe trains", f"after training {100 * tested:.1f} % of {len(test):,} test edges right"
    )
    training
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    A few batches suffice.

    ## Does the model use what it holds?

    What can be read need not be used. To see use, change it. `store.model()` makes the model from the
    weights that the store keeps, for TransformerLens. A hook puts the stored stream of tree 1 after
    layer 2 into a pass over tree 2. Which first step does the model then write?
    """)
    return


@app.cell
def _(figures, store, torch, vocabulary):
    bridge = store.model()
    PROMPT = """
        select token_id, list_position(vocabulary, token::varchar) - 1 as id from tokens, models
        where tree_id = $tree and role != 'path' order by position
    """
    donor, _ = store.read(PROMPT, site="resid_post.2", params={"tree": 1}, out="torch")
    ids = torch.tensor(store.sql(PROMPT, {"tree": 2})["id"].to_list())[None]
    steps = [
        f"→{node}"
        for node in store.sql("select path[1] from trees where tree_id in (1, 2) order by tree_id")["path[1]"]
    ]

    def patch(resid, hook):
        """Put tree 1's stream, float32 [position, d_model], into a pass of one tree."""
        resid[0] = donor
        return resid

    with torch.no_grad():
        passes = {
            "tree 2": bridge(ids),
            "tree 2 with the stream of tree 1": bridge.run_with_hooks(
                ids, fwd_hooks=[("blocks.2.hook_resid_post", patch)]
            ),
        }

    patched, _axes = figures.panels(2, 1.2, sharex=True)
    for _axis, (_name, _logits) in zip(_axes, passes.items(), strict=True):
        _p = _logits[0, -1].softmax(-1)
        _axis.bar(
            range(16), [100 * float(_p[vocabulary.index(f"→{node}")]) for node in range(16)], color=figures.COLOURS[0]
        )
        figures.entitle(_axis, _name)
        figures.percents(_axis)
    _axes[0].set_ylabel("probability (%)")
    _axes[1].set_xticks(range(16))
    _axes[1].set_xlabel("node that the first step goes to")
    figures.heading(patched, "Which first step is written?", f"right is {steps[1]} in tree 2, {steps[0]} in tree 1")
    patched
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    The patched model answers for tree 1: what follows layer 2 works with what the stream holds, and
    not with the tokens that it was given. One pair of trees is an illustration. The studies `patching`,
    `ablate` and `erase` do this for many trees, with controls.

    ## What cannot happen?

    A query reads the store's tables and nothing else. It cannot write, and it cannot reach files or the
    network. A token without an activation is an error, and not a row of zeros.
    """)
    return


@app.cell
def _(actstore, store):
    attempts = {
        "a query that writes": lambda: store.sql("copy trees to 'trees.csv'"),
        "a query of a file": lambda: store.sql("select * from read_csv('/etc/passwd')"),
        "a token that is padding": lambda: store.read("select 255::bigint as token_id"),
    }
    refused = {}
    for _name, _attempt in attempts.items():
        try:
            _attempt()
        except actstore.ActstoreError as error:
            refused[_name] = str(error)
    refused
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## Where next?

    The notebook `reproduction` asks two trained models what they do with edges and goals, and `circuit`
    asks how they find the path. `actstore open demo.act` shows the store in a browser.
    """)
    return


if __name__ == "__main__":
    app.run()
