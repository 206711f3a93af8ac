-- baseline_on_path_height: guesses whether an edge is on the path from what hangs below the edge.
--
-- grain   token_id
-- params  $run         which run
--         $token_role  'edge_source', 'edge_target', 'separator' or 'next_source'
-- yields  token_id  where a probe reads
--         on_path   the guess, 0 or 1: the commoner one among training edges with the same facts
--         p         its probability, 1
--
-- Uses the edges up to this one, at 'edge_source' those before it. The facts are the longest way
-- down from the edge's target (at 'edge_source', from its source), the edge's place in the list,
-- and the number of earlier edges from its source.
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
    select token_at(edges.tree_id, edge, $token_role) as token_id, edges.tree_id, edge, source, on_path::utinyint as on_path, split
    from edges
    join trees using (tree_id)
    join runs using (dataset)
    where run = $run
    and $token_role in ('edge_source', 'edge_target', 'separator', 'next_source')
    and not (is_last and $token_role in ('separator', 'next_source'))
),
heights as (
    select asked.token_id, max(case $token_role when 'edge_source' then steps + 1 else steps end) as height
    from asked
    join chains
        on chains.tree_id = asked.tree_id
        and case $token_role
            when 'edge_source' then chains.top = asked.source and chains.latest < asked.edge
            else chains.above = asked.edge and chains.latest <= asked.edge
        end
    group by asked.token_id
),
known as (
    select
        asked.*,
        coalesce(height, 0) as height,
        (
            select count(*)
            from edges as listed
            where listed.tree_id = asked.tree_id and listed.edge < asked.edge and listed.source = asked.source
        ) as n_siblings
    from asked
    left join heights using (token_id)
),
commoner as (
    select edge, height, n_siblings, mode(on_path order by on_path) as on_path
    from known
    where split = 'train'
    group by all
)
select token_id, commoner.on_path, 1.0::double as p
from known
join commoner using (edge, height, n_siblings)
order by token_id
