-- baseline_depth_above: guesses an edge's depth from how far up the edges listed so far lead.
--
-- grain   token_id
-- params  $run         which run
--         $token_role  'edge_source', 'edge_target', 'separator' or 'next_source'
-- yields  token_id    where a probe reads
--         edge_depth  the guess: the mode of training edges at this place that lead as far up
--         p           its probability, 1
--
-- Uses the edges up to this one, whose target may be missing. Only the last edge's prefix is sure
-- to show the whole way to the root.
with recursive of_run as (
    select tree_id
    from trees
    join runs using (dataset)
    where run = $run
),
chains as (  -- each edge with each edge above it: steps up, and the latest place on the way
    select tree_id, edge, edge as above, source as top, 0 as steps, edge as latest
    from edges
    semi join of_run using (tree_id)
    union all
    select chains.tree_id, chains.edge, edges.edge, edges.source, steps + 1, greatest(latest, edges.edge)
    from chains
    join edges on edges.tree_id = chains.tree_id and edges.target = chains.top
),
asked as (
    select token_at(edges.tree_id, edge, $token_role) as token_id, edges.tree_id, edge, source_depth, split
    from edges
    join trees using (tree_id)
    join runs using (dataset)
    where run = $run
    and $token_role in ('edge_source', 'edge_target', 'separator', 'next_source')
    and not (is_last and $token_role in ('separator', 'next_source'))
),
known as (
    select token_id, edge, any_value(source_depth) as source_depth, any_value(split) as split, max(steps) as n_above
    from asked
    join chains using (tree_id, edge)
    where latest <= edge
    group by token_id, edge
),
commonest as (
    select edge, n_above, mode(source_depth order by source_depth) as edge_depth
    from known
    where split = 'train'
    group by all
)
select token_id, edge_depth, 1.0::double as p
from known
join commonest using (edge, n_above)
order by token_id
