-- baseline_next_child: guesses the next node of the path: a child of the node that the path has
-- reached, each equally likely.
--
-- grain   token_id, next_node
-- params  $run  which run
-- yields  token_id   where a probe reads: the root, and each step of the path but the last
--         next_node  a guess, a label
--         p          its probability, [0, 1]
--
-- Uses the whole list and the node at the token, but not the goal.
with steps as (
    select token_id, answer_tokens.tree_id, edges.source as node
    from answer_tokens
    join edges using (tree_id, step)
    join runs using (dataset)
    where run = $run
)
select token_id, target as next_node, 1 / (count(*) over (partition by token_id))::double as p
from steps
join edges on edges.tree_id = steps.tree_id and edges.source = steps.node
order by token_id, next_node
