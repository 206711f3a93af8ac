-- baseline_next_inner: guesses the next node of the path: the goal if it is a child, else an inner
-- child, each equally likely.
--
-- grain   token_id, next_node
-- params  $run  which run
-- yields  token_id   where a probe reads: the root, and each step of the path but the last
--         next_node  a guess, a label
--         p          its probability, [0, 1]
--
-- Uses the whole list, the node at the token, and the goal, if the goal is one step away.
with steps as (
    select token_id, answer_tokens.tree_id, edges.source as node, goal
    from answer_tokens
    join edges using (tree_id, step)
    join runs using (dataset)
    where run = $run
),
children as (
    select
        token_id,
        target as next_node,
        target = goal as is_goal,
        bool_or(target = goal) over (partition by token_id) as goal_is_child,
        exists (from edges as next where next.tree_id = steps.tree_id and next.source = edges.target) as is_inner
    from steps
    join edges on edges.tree_id = steps.tree_id and edges.source = steps.node
)
select token_id, next_node, 1 / (count(*) over (partition by token_id))::double as p
from children
where case when goal_is_child then is_goal else is_inner end
order by token_id, next_node
