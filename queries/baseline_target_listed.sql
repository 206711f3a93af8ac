-- baseline_target_listed: guesses an edge's target from the targets listed up to the edge, each
-- equally likely.
--
-- grain   token_id, target
-- params  $run         which run
--         $token_role  'edge_target', 'separator' or 'next_source'; other roles give no rows
-- yields  token_id  where a probe reads
--         target    a guess, a label
--         p         its probability, [0, 1]
--
-- Uses the words of the edges up to this one, itself included, without their order: a bag of words.
-- A node is a target once, so the guess is right once in e + 1 at edge e.
with asked as (
    select token_at(edges.tree_id, edge, $token_role) as token_id, edges.tree_id, edge
    from edges
    join trees using (tree_id)
    join runs using (dataset)
    where run = $run
    and $token_role in ('edge_target', 'separator', 'next_source')
    and not (is_last and $token_role in ('separator', 'next_source'))
)
select token_id, listed.target, 1 / (asked.edge + 1.0) as p
from asked
join edges as listed on listed.tree_id = asked.tree_id and listed.edge <= asked.edge
order by token_id, listed.target
