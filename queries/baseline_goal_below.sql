-- baseline_goal_below: guesses the goal on the path: a leaf below the node that the path has
-- reached, each equally likely.
--
-- grain   token_id, goal
-- params  $run  which run
-- yields  token_id  where a probe reads: the root, and each step of the path but the last
--         goal      a guess, a label
--         p         its probability, [0, 1]
--
-- Uses the whole list and the path so far, but not the prompt's goal.
with recursive of_run as (
    select tree_id
    from trees
    join runs using (dataset)
    where run = $run
),
below as (
    select tree_id, source as node, target as found
    from edges
    semi join of_run using (tree_id)
    union all
    select below.tree_id, below.node, edges.target
    from below
    join edges on edges.tree_id = below.tree_id and edges.source = below.found
),
leaves as (
    from below
    anti join edges on edges.tree_id = below.tree_id and edges.source = below.found
)
select token_id, found as goal, 1 / (count(*) over (partition by token_id))::double as p
from answer_tokens
join edges using (tree_id, step)
join leaves on leaves.tree_id = answer_tokens.tree_id and leaves.node = edges.source
order by token_id, goal
