"""The page that `actstore open STORE` shows, a marimo app.

The environment variable ACTSTORE_STORE names the store, for `marimo edit queries/app/app.py` too.
Each panel is a cell that stops unless the panel is chosen. The controls have cells of their own, so
that they keep their values.
"""

import marimo

app = marimo.App(width="full", app_title="actstore")


@app.cell
def _():
    import functools
    import html
    import os
    import zlib

    import marimo as mo
    import numpy as np

    from actstore.errors import ActstoreError
    from actstore.queries.app import asked, drawing, mapped, recorded, serve
    from actstore.queries.app import sequence as sequences
    from actstore.queries.app.widgets import Map, Picture, SqlBox

    return (
        ActstoreError,
        Map,
        Picture,
        SqlBox,
        asked,
        drawing,
        functools,
        html,
        mapped,
        mo,
        np,
        os,
        recorded,
        sequences,
        serve,
        zlib,
    )


@app.cell
def _(asked, mo, os, serve):
    store = serve.shared(os.environ["ACTSTORE_STORE"])
    runs = store.runs()
    mo.stop(not runs, mo.md(f"`{store.path}` holds no run yet."))
    texts = asked.of_text(store)
    trees = [run for run in runs if run not in texts]
    is_text = asked.is_text(store)
    return is_text, runs, store, texts, trees


@app.cell
def _(mo, store, texts, trees):
    panel = mo.ui.radio(
        ["holds", "sql", *["tree"] * bool(trees), *["text"] * bool(texts), "map", "results"], value="holds", inline=True
    )
    mo.vstack([mo.md(f"## {store.path.name}"), panel])
    return (panel,)


@app.cell
def _(asked, mo, panel, store):
    mo.stop(panel.value != "holds")
    mo.vstack(
        [
            mo.md(asked.counts(store)),
            *([mo.md(asked.older(store))] if store.catalog_is_older else []),
            mo.md("**Runs**"),
            mo.ui.table(store.info(), selection=None, page_size=20),
            mo.md("**Tables and views**, with what each column holds"),
            mo.ui.table(store.schema(), selection=None, page_size=12),
        ]
    )
    return


@app.cell
def _(SqlBox, asked, is_text, mo, runs, store):
    box = mo.ui.anywidget(SqlBox(text=asked.FIRST_OF_TEXT if is_text else asked.FIRST, words=asked.words(store)))
    sql_run = mo.ui.dropdown([asked.WHOLE, *runs], value=runs[0] if len(runs) == 1 else asked.WHOLE, label="rows of")
    given = mo.ui.text(placeholder="n=20 seed=0", label="parameters")
    return box, given, sql_run


@app.cell
def _(box, given, mo, panel, sql_run):
    mo.stop(panel.value != "sql")
    mo.vstack([mo.hstack([sql_run, given], justify="start"), box])
    return


@app.cell
def _(asked, box, drawing, functools, given, html, mo, panel, sql_run, store):
    mo.stop(panel.value != "sql" or not box.value["times"])
    _typed = box.value["asked"], None if sql_run.value == asked.WHOLE else sql_run.value, given.value
    told = asked.ask(store, *_typed)
    mo.stop(told.frame is None, mo.Html(f'<p class="told" style="color:#b03000">{html.escape(told.said)}</p>'))
    _rows = told.frame

    mo.vstack(
        [
            mo.Html(f'<p class="told">{html.escape(told.said)}</p>'),
            mo.ui.table(
                _rows,
                selection=None,
                page_size=15,
                format_mapping={name: lambda x: mo.Html(drawing.bars(x)) for name in asked.vectors(_rows)},
            ),
            mo.download(
                functools.partial(asked.whole, store, *_typed), filename="rows.parquet", label="Parquet, all rows"
            ),
        ]
    )
    return


@app.cell
def _(Picture, mo, panel, texts, trees):
    # one picture for both kinds of sequences: a click chooses the token that attends
    picture = mo.ui.anywidget(Picture())
    tree_run = mo.ui.dropdown(trees, value=trees[0] if trees else None, label="run")
    text_run = mo.ui.dropdown(texts, value=texts[0] if texts else None, label="run")
    return picture, text_run, tree_run


@app.cell
def _(mo, panel, sequences, store, text_run, tree_run):
    mo.stop(panel.value not in ("tree", "text"))
    run = tree_run.value if panel.value == "tree" else text_run.value
    _has = sequences.held(store, run)
    number = mo.ui.number(_has["first"], _has["last"], step=1, value=_has["first"], label=panel.value)
    return number, run


@app.cell
def _(ActstoreError, mo, run, sequences, store):
    try:
        _layers, lacks = sequences.layers(store, run), ""
        _heads = sequences.heads(store, run, _layers[0])
    except ActstoreError as _error:
        _layers, _heads, lacks = [], [sequences.MEAN], str(_error)
    layer = mo.ui.dropdown(_layers, value=_layers[0] if _layers else None, label="attention of")
    head = mo.ui.dropdown(_heads, value=sequences.MEAN, label="head")
    lens_of = mo.ui.dropdown(
        ["likeliest", "right"], value="likeliest", label="logit lens: probability of the token that is"
    )
    _probes = sequences.probes(store, run).to_dicts()
    _named = {f"{one['label']} at {one['token_role'] or 'any token'}, fitted in {one['run']}": one for one in _probes}
    probe = mo.ui.dropdown(_named, value=next(iter(_named), None), label="probe")
    return head, lacks, layer, lens_of, probe


@app.cell
def _(ActstoreError, html, mo, number, run, sequences, store):
    try:
        seen = sequences.sequence(store, run, number.value)
    except ActstoreError as _error:
        mo.stop(True, mo.vstack([number, mo.md(html.escape(str(_error)))]))
    return (seen,)


@app.cell
def _(drawing, head, html, lacks, layer, mo, panel, picture, seen, sequences, store):
    mo.stop(panel.value not in ("tree", "text"))
    _chosen = picture.value
    at = _chosen["at"] if _chosen["of"] == seen.sequence_id and 0 <= _chosen["at"] < len(seen.tokens) else seen.asked
    if layer.value:
        weights = sequences.attention(store, seen, layer.value, at, head.value)
        attended = sequences.most(seen, weights, at)
    else:
        weights, attended = None, lacks
    picture.widget.shown = seen.sequence_id
    picture.widget.html = drawing.sequence(seen, at, weights)
    return at, attended


@app.cell
def _(attended, drawing, head, html, layer, mo, number, panel, picture, seen, text_run, tree_run):
    mo.stop(panel.value not in ("tree", "text"))
    _about = drawing.about(seen)
    mo.vstack(
        [
            mo.hstack([tree_run if panel.value == "tree" else text_run, number, layer, head], justify="start"),
            mo.Html(f'<p class="about">{html.escape(_about)}</p>'),
            picture,
            mo.Html(f'<p class="attended">{html.escape(attended)} Click a token to see what it attends to.</p>'),
            *([mo.Html(drawing.steps(seen))] if seen.tree and len(seen.answers) else []),
        ]
    )
    return


@app.cell
def _(ActstoreError, at, drawing, html, lens_of, mo, panel, seen, sequences, store):
    mo.stop(panel.value not in ("tree", "text"))
    try:
        _grid = sequences.lens(store, seen, at, lens_of.value)
        _shown = [mo.Html(drawing.heat(_grid, seen.words, at)), mo.Html(f"<p>{html.escape(_grid.said)}</p>")]
    except ActstoreError as _error:
        _shown = [mo.Html(f"<p>No logit lens: {html.escape(str(_error))}</p>")]
    mo.vstack([lens_of, *_shown])
    return


@app.cell
def _(ActstoreError, at, drawing, html, mo, panel, probe, seen, sequences, store):
    mo.stop(panel.value not in ("tree", "text"))
    mo.stop(
        probe.value is None,
        mo.md(
            "No probe is recorded for this model: `actstore study STORE probes` (of trees), or `probe`, records one."
        ),
    )
    try:
        _grid = sequences.readouts(store, seen, probe.value, at)
        _shown = [mo.Html(drawing.heat(_grid, seen.words, at)), mo.Html(f"<p>{html.escape(_grid.said)}</p>")]
    except ActstoreError as _error:
        _shown = [mo.Html(f"<p>No read-out: {html.escape(str(_error))}</p>")]
    mo.vstack([probe, *_shown])
    return


@app.cell
def _(Map, mapped, mo, runs):
    plane = mo.ui.anywidget(Map())
    map_run = mo.ui.dropdown(runs, value=runs[0], label="run")
    method = mo.ui.dropdown(mapped.METHODS, value=mapped.PCA, label="by")
    most = mo.ui.number(100, 20_000, step=100, value=mapped.MOST, label="at most rows")
    return map_run, method, most, plane


@app.cell
def _(map_run, mapped, mo, store):
    _sites = mapped.sites(store, map_run.value)
    map_site = mo.ui.dropdown(_sites, value=_sites[-1] if _sites else None, label="site")
    map_query = mo.ui.text_area(
        mapped.first(store, map_run.value), label="Tokens: a query with a column token_id", full_width=True, rows=3
    ).form(submit_button_label="Draw", bordered=False)
    return map_query, map_site


@app.cell
def _(ActstoreError, html, map_query, map_run, map_site, mapped, method, mo, most, panel, store):
    mo.stop(panel.value != "map")
    mo.stop(map_site.value is None, mo.vstack([map_run, mo.md("This run holds no site with a vector per token.")]))
    _query = map_query.value or mapped.first(store, map_run.value)
    try:
        with mo.status.spinner(mapped.WAITING[method.value]):
            drawn, _said = mapped.plane(store, _query, map_run.value, map_site.value, method.value, most.value), ""
        _said = drawn.said
    except ActstoreError as _error:
        drawn, _said = None, " ".join(str(_error).split())
    _columns = [] if drawn is None else mapped.columns(drawn.rows)
    colour = mo.ui.dropdown(_columns, value=_columns[0] if _columns else None, label="coloured by")
    mo.vstack(
        [
            mo.hstack([map_run, map_site, method, most], justify="start"),
            map_query,
            mo.Html(f'<p class="drawn">{html.escape(_said)}.</p>'),
        ]
    )
    return colour, drawn


@app.cell
def _(colour, drawn, mapped, mo, np, plane, zlib):
    mo.stop(drawn is None)
    _values = np.zeros(len(drawn.rows), np.float32)
    _look = mapped.coloured(drawn.rows[colour.value]) if colour.value else mapped.Coloured(_values, ["token"], [])
    _widget = plane.widget
    _widget.classes, _widget.ends, _widget.colour = _look.classes, _look.ends, colour.value or ""
    _widget.axes, _widget.labels = list(drawn.axes), mapped.labels(drawn.rows)
    _points = np.column_stack([drawn.places, _look.values]).astype("<f4").tobytes()
    key = zlib.crc32(_points)
    _widget.key, _widget.points = key, _points
    mo.vstack([colour, plane])
    return (key,)


@app.cell
def _(box, drawn, html, key, mapped, mo, plane):
    mo.stop(drawn is None)
    _brushed = plane.value["brushed"]
    _query = mapped.brushed(drawn.rows, _brushed["at"]) if _brushed.get("of") == key else ""
    mo.stop(not _query, mo.md("A rectangle on the map becomes a query in the SQL box."))
    box.widget.text = _query
    _shown = _query if len(_query) < 400 else f"{_query[:400]} …"
    mo.Html(f'<p>In the SQL box now:</p><pre class="brushed" style="white-space:pre-wrap">{html.escape(_shown)}</pre>')
    return


@app.cell
def _(mo, recorded, store):
    _listed = recorded.listed(store)
    answers = dict(_listed.group_by("study", maintain_order=True).agg("run").iter_rows())
    study = mo.ui.dropdown(list(answers), value=next(iter(answers), None), label="study")
    return answers, study


@app.cell
def _(answers, mo, recorded, store, study):
    _runs = answers.get(study.value, [])
    beside = mo.ui.multiselect(_runs, value=_runs[:2], label="runs, side by side")
    _metrics = recorded.metrics(store, study.value) if study.value else []
    metric = mo.ui.dropdown(_metrics, value=_metrics[0] if _metrics else None, label="numbers")
    return beside, metric


@app.cell
def _(ActstoreError, beside, drawing, html, metric, mo, panel, recorded, store, study):
    mo.stop(panel.value != "results")
    mo.stop(study.value is None, mo.md("No study is recorded: `actstore study STORE NAME` records one."))
    _columns = []
    for _run, _figure in zip(beside.value, recorded.figures(store, study.value, beside.value), strict=True):
        if isinstance(_figure, ActstoreError):
            _drawn = f"<p>{html.escape(str(_figure))}</p>"
        else:
            _grid = recorded.probe_grid(store, study.value, _run)
            _drawn = (drawing.heat(*_grid, fits=True) if _grid else "") + drawing.image(_figure)
        _columns.append(f"<b>{html.escape(_run)}</b>{_drawn}")
    _table = (
        [] if metric.value is None else [mo.ui.table(recorded.beside(store, study.value, metric.value), selection=None)]
    )
    mo.vstack(
        [
            mo.hstack([study, beside], justify="start"),
            mo.Html(drawing.beside(_columns)),
            metric,
            *_table,
        ]
    )
    return


if __name__ == "__main__":
    app.run()
