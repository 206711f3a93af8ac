-- baseline_target_unlisted: guesses an edge's target before the prompt gives it: a node not yet
-- listed as a target.
--
-- grain   token_id, target
-- params  $run         which run
--         $token_role  'edge_source'; other roles give no rows
-- yields  token_id  where a probe reads
--         target    a guess, a label
--         p         its probability, [0, 1]
--
-- Uses the edges before this one and this edge's source: a node is a target once, and never its
-- own.
with asked as (
    select token_at(edges.tree_id, edge, 'edge_source') as token_id, edges.tree_id, edge, source
    from edges
    join trees using (tree_id)
    join runs using (dataset)
    where run = $run
    and $token_role = 'edge_source'
),
labels as (
    select asked.*, unnest(range(n_nodes)) as target
    from asked
    join trees using (tree_id)
    join datasets using (dataset)
),
left_over as (
    from labels
    anti join edges as listed
        on listed.tree_id = labels.tree_id and listed.edge < labels.edge and listed.target = labels.target
    where labels.target != labels.source
)
select token_id, target, 1 / (count(*) over (partition by token_id))::double as p
from left_over
order by token_id, target
