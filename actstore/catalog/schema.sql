-- The tables of a store. `catalog.duckdb` holds each table natively, filled from the committed parts.
-- A reader never writes a table. The comment of each line `name type, -- …` becomes the column's
-- comment in the catalog. Numbers are signed here, so that queries can subtract (`depth - 2`). The
-- parts hold small numbers unsigned.
--
-- A token has one number. In a grid of sequences token_id = datasets.first_token_id + i * stride + position for sequence
-- i of the dataset; trees are such sequences, with a stride of 256, so token_id = tree_id * 256 + position. In the layout
-- `rows` the tokens of a sequence are numbered on from sequences.first_token_id. A tree's sequence_id is its tree_id.

create type token_word as enum (  -- in the order of ingest/trees/tokens.py, in the reproduction's spelling
    '<PAD>', ',', '|', ':', '0', '→0', '1', '→1', '2', '→2', '3', '→3', '4', '→4', '5', '→5', '6', '→6', '7', '→7',
    '8', '→8', '9', '→9', '10', '→10', '11', '→11', '12', '→12', '13', '→13', '14', '→14', '15', '→15', '16', '→16',
    '17', '→17', '18', '→18', '19', '→19', '20', '→20', '21', '→21', '22', '→22', '23', '→23', '24', '→24', '25',
    '→25', '26', '→26', '27', '→27', '28', '→28', '29', '→29', '30', '→30', '31', '→31', '32', '→32', '33', '→33',
    '34', '→34', '35', '→35', '36', '→36', '37', '→37', '38', '→38', '39', '→39', '40', '→40', '41', '→41', '42',
    '→42', '43', '→43', '44', '→44', '45', '→45', '46', '→46', '47', '→47', '48', '→48', '49', '→49', '50', '→50',
    '51', '→51', '52', '→52', '53', '→53', '54', '→54', '55', '→55', '56', '→56', '57', '→57', '58', '→58', '59',
    '→59', '60', '→60', '61', '→61', '62', '→62', '63', '→63'
);

create type token_role as enum ('edge_source', 'edge_target', 'separator', 'bar', 'goal', 'colon', 'root', 'path');

create type tree_split as enum ('train', 'test');

create type failure_kind as enum ('wrong_child', 'not_a_child', 'not_a_step');

create table snapshot (
    format_version integer, -- of the store's files, see store.json
    snapshot integer, -- commits this catalog holds: the number of manifests, recorded with every result
    log_xxh3_128 varchar, -- hash of these manifests, see actstore/README.md
);

create table models (
    weights_sha256 varchar, -- of the canonical safetensors file: `sha256sum data/checkpoints/NAME.safetensors` prints it
    model varchar, -- name it was loaded by
    system varchar, -- 'reproduction' or 'baseline': the vocabulary, padding and loss; NULL for a model of other tokens
    n_nodes smallint, -- labels in the vocabulary, 2 to 64; NULL for a model of other tokens
    n_layers smallint, -- transformer blocks
    n_heads smallint, -- attention heads per block
    d_model integer, -- width of the residual stream
    d_head integer, -- width of a head
    d_mlp integer, -- hidden width of the MLP
    n_ctx integer, -- positions the model has embeddings for
    d_vocab integer, -- token ids
    n_params bigint, -- trained numbers
    vocabulary varchar[], -- spelling of each token id, the first is id 0
    config varchar, -- the whole configuration, JSON
    source varchar, -- file the weights came from
    architecture varchar, -- class of the model, 'LlamaForCausalLM'; NULL for a path-finding system
    normalization varchar, -- of the final layer: 'LN' or 'RMS'; NULL for a path-finding system (LN), or without one
    tokenizer varchar, -- hash of the tokenizer; NULL without one
    weights_kept boolean, -- the store holds the weights; NULL for a path-finding system, whose weights it holds
    facts varchar, -- files and their hashes, dtype, attention implementation, padding, mask; JSON
);

create table datasets (
    dataset varchar, -- name of the set of sequences
    distribution varchar, -- 'reproduction', 'baseline' or 'deep'; NULL for a set that was not drawn
    seed bigint, -- seed of the endless stream of trees; the set is its first n_trees
    n_nodes smallint, -- nodes of each tree, 2 to 64
    depths smallint[], -- goal depths to draw from, NULL for the distribution's own
    n_trees integer, -- trees planned; `trees` holds those committed
    n_positions integer, -- tokens of the longest sequence; of trees: of the longest prompt and path, 4 * n_nodes - 1
    first_tree_id integer, -- tree_id of the first tree
    trees_per_shard integer, -- trees per batch, and so rows per chunk of every array
    variant_of varchar, -- original set: its tree i became tree i here; NULL for a drawn set
    change varchar, -- change made to each tree: 'swap_last' or 'swap_inner', NULL for a drawn set
    task varchar, -- 'trees' or 'tokens': what the sequences are
    layout varchar, -- 'grid' [sequence, position] or 'rows' [row]: how the arrays of its runs are laid out
    first_token_id bigint, -- first token id of the dataset
    n_ids bigint, -- token ids from first_token_id on that belong to the dataset; some may be of no token
    stride integer, -- ids from one sequence to the next, in a grid; NULL in rows
    first_sequence_id bigint, -- sequence_id of the first sequence
    n_sequences bigint, -- sequences planned; `sequences` holds those committed
    n_tokens bigint, -- tokens planned; NULL for trees
    rows_per_shard integer, -- ids per batch, in rows; NULL in a grid
    rows_per_chunk integer, -- rows of one inner chunk, in rows; NULL in a grid
    vocabulary varchar, -- vocabularies.vocabulary; NULL for trees
    recipe varchar, -- where the tokens came from, and how documents were cut; JSON, NULL for trees
);

create table trees (
    tree_id integer, -- unique in the store
    dataset varchar, -- datasets.dataset
    root smallint, -- label of the root, [0, n_nodes)
    goal smallint, -- label of the goal, a leaf
    depth smallint, -- edges from root to goal, the steps of the path, 1 to n_nodes - 1
    height smallint, -- edges from root to the deepest leaf
    n_leaves smallint, -- nodes without children
    path smallint[], -- labels from the root's child to the goal
    backward boolean, -- every edge is listed after all the edges below it
    tree_hash ubigint, -- xxh3-64 of the labelled tree; goal and edge order do not count
    split tree_split, -- chosen by tree_hash, never by row: 'test' for one tree in five
    variant_of integer, -- tree_id of the original tree, NULL for a drawn tree
    change varchar, -- the change made, 'edge 3 <-> edge 14'; NULL for a drawn tree, or if no change was possible
);

create table listed_sequences (
    sequence_id bigint, -- unique in the store
    dataset varchar, -- datasets.dataset
    first_token_id bigint, -- id of the first token
    n_tokens integer, -- tokens of the sequence
    hash ubigint, -- xxh3-64 of the token numbers, little-endian 32-bit
    split tree_split, -- chosen by the hash of the whole document: 'test' for one document in five
    document bigint, -- row of the input that the sequence was cut from, from 0
);

create table vocabularies (
    vocabulary varchar, -- hash of the tokenizer
    number integer, -- number of the token, from 0
    token varchar, -- the token as the tokenizer spells it
);

create table relations (
    name varchar, -- name of the table
    grain varchar, -- 'token' or 'sequence': its key is token_id or sequence_id; NULL for a view
    kind varchar, -- 'documents' (columns of a dataset's input), 'labels' (a user's) or 'view' (a user's)
    owner varchar, -- dataset, or name of the label or view
    declared varchar, -- JSON: name, type and comment of each column; of a view its SELECT, under sql
);

create table edges (
    tree_id integer, -- trees.tree_id
    edge smallint, -- place in the list, 0 to n_nodes - 2
    source smallint, -- label of the parent, [0, n_nodes)
    target smallint, -- label of the child, [0, n_nodes)
    source_depth smallint, -- edges from the root to the source
    on_path boolean, -- the path from root to goal takes this edge
    step smallint, -- number of the step along the path, 0 to depth - 1; NULL off the path
    is_last boolean, -- listed last, and so followed by the bar instead of a separator
);

create table tokens (
    token_id bigint, -- unique in the store; of a tree: tree_id * 256 + position
    tree_id integer, -- trees.tree_id; NULL for other sequences, as are role, edge, node and step
    position integer, -- place in the sequence, from 0; of a tree: 0 to 4 * n_nodes - 2
    token token_word, -- the token, spelled the same for both systems; of text: the piece as its tokenizer spells it
    role token_role, -- what the position is
    edge smallint, -- edges.edge that this token writes; NULL after the bar
    node smallint, -- label that the token names, [0, n_nodes); NULL for punctuation
    step smallint, -- number of the step along the path, 0 to depth - 1; NULL before the path
    dataset varchar, -- datasets.dataset, derived from token_id; the parts have no such column
    sequence_id bigint, -- sequences.sequence_id; of a tree: tree_id
    number integer, -- the token's number in the vocabulary; NULL for trees
    start integer, -- first byte of the token in the document's text, UTF-8; NULL where no text says it
    stop integer, -- byte after the token's last; NULL as start
);

create table runs (
    run varchar, -- name of the run: one model over one dataset
    weights_sha256 varchar, -- models.weights_sha256
    dataset varchar, -- datasets.dataset
    first_tree_id integer, -- tree_id of row 0 of every array of the run; NULL for other sequences
    n_trees integer, -- trees planned, rows of every array; NULL for other sequences
    prompt varchar, -- the model's input: 'task' (tree, goal, root, path), 'tree' (only the edges, up to the bar) or 'text' (text that it continues); NULL for text
    samples smallint, -- continuations drawn per sequence, besides the greedy one; NULL for whole tasks and text
    device varchar, -- device that the model ran on
    versions varchar, -- of actstore, torch and transformer_lens, batch_size (sequences per forward pass) and, of text or if it stores none, answers; JSON
);

create table sites (
    run varchar, -- runs.run
    site varchar, -- TransformerLens' name, 'blocks.0.hook_resid_post'
    short varchar, -- the short form, 'resid_post.0'
    kind varchar, -- 'resid', 'vector' [tree, position, d_model], 'heads' [tree, position, head, d_head] or 'pattern' [tree, head, query, key]
    shape bigint[], -- of the array
    path varchar, -- of the Zarr array inside the store
    axes varchar[], -- names of the array's axes; NULL for resid and pattern of trees
    lineage varchar, -- for vectors that no forward pass of the run gave: what they are, from which site, by which code; JSON
);

create table shards (
    run varchar, -- runs.run
    site varchar, -- sites.site
    batch integer, -- index of the shard along the trees
    first_tree_id integer, -- sequence_id of the shard's first sequence
    n_trees integer, -- sequences in the shard
    path varchar, -- of the file inside the store
    bytes bigint, -- size of the file
    xxh3_128 varchar, -- hash of the file
);

create table predictions (
    run varchar, -- runs.run
    token_id bigint, -- the token whose activation predicts: the root, or any step but the last; of text: any token but the last
    tree_id integer, -- trees.tree_id; NULL for other sequences, as is step
    step smallint, -- number of the predicted step, 0 to depth - 1
    target token_word, -- the right step
    predicted token_word, -- the most probable token
    p_target float, -- probability of target, [0, 1]
    correct boolean, -- predicted = target
    sequence_id bigint, -- sequences.sequence_id; of a tree: tree_id
    loss float, -- -log(p_target), nats; NULL for trees
    rank integer, -- tokens more probable than the target; NULL for trees
    top varchar[], -- the most probable tokens, the best first; NULL unless asked for
);

create table outcomes (
    run varchar, -- runs.run
    tree_id integer, -- trees.tree_id
    teacher_forced_right boolean, -- every step is right, given the right steps before it
    greedy_path smallint[], -- nodes of the path when the model continues from its own answers
    greedy_right boolean, -- greedy_path = trees.path
    first_wrong_step smallint, -- first wrong step of the greedy answer, 0 to depth - 1; NULL when right
    failure failure_kind, -- kind of the first wrong step; NULL when right
);

create table interventions (
    run varchar, -- runs.run, of a run with edited activations: it holds the edited sequences alone
    edit smallint, -- number of the edit, from 0
    base_run varchar, -- runs.run: the run whose model and sequences these are
    site varchar, -- TransformerLens' name of the edited site
    short varchar, -- its short form
    how varchar, -- 'replace', 'add', 'zero', 'mean', 'project' or 'knockout'
    donor_run varchar, -- run that the donors' rows are of; NULL without donors
    donor_site varchar, -- short name of the site that they are read from; NULL without donors
    query varchar, -- SQL that chose the rows of `edits`
    params varchar, -- parameters of the query, JSON
    snapshot integer, -- data version that the query read: snapshot.snapshot
    n_edits bigint, -- rows of `edits`
    donors_xxh3_128 varchar, -- hash of the donors' rows, one after another, float32; NULL without donors
);

create table edits (
    run varchar, -- interventions.run
    edit smallint, -- interventions.edit
    token_id bigint, -- the edited token
    head smallint, -- the edited head; NULL for all
    key_token_id bigint, -- token that is no longer attended to; NULL except of 'knockout'
    donor_token_id bigint, -- token whose activation takes part; NULL without donors
    vector float[], -- numbers that take part; NULL without
);

create table generations (
    run varchar, -- runs.run, of a run whose prompt is 'tree' or 'text'
    tree_id integer, -- trees.tree_id; NULL for other sequences
    sample smallint, -- 0 for the greedy continuation; 1 and up are drawn from the model's own distribution
    position integer, -- place in the sequence; the first is the one after what the model read: of trees, after the bar
    token token_word, -- the model's token there, spelled the same for both systems
    p float, -- probability that the model gave to the token, [0, 1]
    p_best float, -- probability of the model's likeliest token, [0, 1]
    sequence_id bigint, -- sequences.sequence_id; of a tree: tree_id
);

create table results (
    study varchar, -- name of the study
    recorded integer, -- number of the commit that recorded it
    run varchar, -- runs.run
    site varchar, -- short site name, NULL if the study reads no site
    token_role varchar, -- role of the tokens that were read, NULL if the study reads none
    label varchar, -- the property asked for
    metric varchar, -- what `value` measures
    value double, -- the answer
    low double, -- lower end of the 95 % interval
    high double, -- upper end of the 95 % interval
    n bigint, -- number of rows behind the value, or of trees if the metric says so
    query varchar, -- SQL that chose the rows
    params varchar, -- parameters of the query and the study, JSON
    snapshot integer, -- data version that the study read: snapshot.snapshot
    seed bigint, -- seed of everything random
    version varchar, -- version of actstore
    name varchar, -- the direction's name for probe_direction(): run/site/token_role/label=class; NULL without a direction
    direction float[], -- weights [d_model] of metric 'direction', in the activations' own units: dot(x, direction) + value is the logit
);

create view sequences as  -- one row per sequence: every tree, and every sequence of other datasets
select
    t.tree_id::bigint as sequence_id, t.dataset, t.tree_id::bigint * 256 as first_token_id,
    3 * d.n_nodes::integer + t.depth as n_tokens, t.tree_hash as hash, t.split, null::bigint as document
from trees t join datasets d using (dataset)
union all from listed_sequences;

create view edge_sources as  -- one row per edge, at the token that writes its source
select e.tree_id::bigint * 256 + 3 * e.edge as token_id, e.*, t.dataset, t.root, t.goal, t.depth, t.split
from edges e join trees t using (tree_id);

create view edge_targets as  -- one row per edge, at the token that writes its target
select e.tree_id::bigint * 256 + 3 * e.edge + 1 as token_id, e.*, t.dataset, t.root, t.goal, t.depth, t.split
from edges e join trees t using (tree_id);

create view edge_separators as  -- one row per edge, at the separator after it (the last edge: the bar)
select e.tree_id::bigint * 256 + 3 * e.edge + 2 as token_id, e.*, t.dataset, t.root, t.goal, t.depth, t.split
from edges e join trees t using (tree_id);

create view answer_tokens as  -- one row per step of the path, at the token that must predict it
select
    t.tree_id::bigint * 256 + 3 * d.n_nodes - 1 + s.step as token_id,
    t.tree_id, s.step::smallint as step, t.path[s.step + 1] as next_node,
    t.dataset, t.root, t.goal, t.depth, t.split
from trees t join datasets d using (dataset), lateral (select unnest(range(t.depth)) as step) s;

create view latest_results as  -- the latest rows of each number that a study recorded
select * from results
qualify rank() over (
    partition by study, run, site, token_role, label, metric, name, params order by recorded desc
) = 1;
