-- baseline_on_path_inner: guesses whether an edge is on the path from whether its target is known
-- to be an inner node.
--
-- grain   token_id
-- params  $run         which run
--         $token_role  'edge_target', 'separator' or 'next_source'; other roles give no rows
-- yields  token_id  where a probe reads
--         on_path   the guess, 0 or 1: the commoner one among training edges with the same facts
--         p         its probability, 1
--
-- Uses the edges up to this one, and at 'next_source' also the next edge's source. The fact is
-- whether an edge leaves the target.
with asked as (
    select token_at(edges.tree_id, edge, $token_role) as token_id, edges.tree_id, edge, target, on_path::utinyint as on_path, split
    from edges
    join trees using (tree_id)
    join runs using (dataset)
    where run = $run
    and $token_role in ('edge_target', 'separator', 'next_source')
    and not (is_last and $token_role in ('separator', 'next_source'))
),
known as (
    select
        asked.*,
        exists (
            from edges as listed
            where listed.tree_id = asked.tree_id
            and listed.edge <= asked.edge + ($token_role = 'next_source')::int
            and listed.source = asked.target
        ) as is_inner
    from asked
),
commoner as (
    select is_inner, mode(on_path order by on_path) as on_path
    from known
    where split = 'train'
    group by is_inner
)
select token_id, commoner.on_path, 1.0::double as p
from known
join commoner using (is_inner)
order by token_id
