-- baseline_goal_leaf: guesses the goal before the prompt gives it: a node that no edge has left so
-- far, each equally likely.
--
-- grain   token_id, goal
-- params  $run         which run
--         $token_role  'edge_source', 'edge_target', 'separator' or 'next_source'
-- yields  token_id  where a probe reads
--         goal      a guess, a label
--         p         its probability, [0, 1]
--
-- Uses the sources listed up to the token; at 'next_source' also the next edge's. A goal is a leaf,
-- and a leaf is never a source.
with asked as (
    select token_at(edges.tree_id, edge, $token_role) as token_id, edges.tree_id, edge
    from edges
    join trees using (tree_id)
    join runs using (dataset)
    where run = $run
    and $token_role in ('edge_source', 'edge_target', 'separator', 'next_source')
    and not (is_last and $token_role in ('separator', 'next_source'))
),
labels as (
    select asked.*, unnest(range(n_nodes)) as goal
    from asked
    join trees using (tree_id)
    join datasets using (dataset)
),
left_over as (
    from labels
    anti join edges as listed
        on listed.tree_id = labels.tree_id
        and listed.edge <= labels.edge + ($token_role = 'next_source')::int
        and listed.source = labels.goal
)
select token_id, goal, 1 / (count(*) over (partition by token_id))::double as p
from left_over
order by token_id, goal
