-- attention_by_goal_distance: how much a path's tokens look at the targets of edges, by the
-- distance between the target and the goal.
--
-- grain   head, on_path, distance
-- params  $run         which run; it holds the pattern
--         $site        the pattern, short or long name
--         $token_role  'root', or 'path' for the steps of the path but the last
-- yields  head       number of the head, from 0
--         on_path    the target is on the path: the goal or an ancestor of the goal
--         distance   edges of the tree between target and goal; 0 is the goal itself
--         n          pairs of a token and an edge
--         attention  mean weight at the target, [0, 1]
--         even       mean weight under even attention, 1 / (number of tokens so far)
--
-- The rows off the path are the control: as far from the goal, and no ancestors. The root is no
-- edge's target. The pairs of one tree are not independent: take intervals over trees.
with recursive of_run as (
    select tree_id from held_trees($run)
),
nodes as (  -- each node on the path, and then all that hangs on it off the path
    select
        tree_id,
        unnest([root] || path) as node,
        unnest(range(depth, -1, -1)) as distance
    from trees
    semi join of_run using (tree_id)
    union all
    select edges.tree_id, edges.target, distance + 1
    from nodes
    join edges on edges.tree_id = nodes.tree_id and edges.source = nodes.node
    where not edges.on_path
),
asked as (
    select token_id, tree_id, attention(token_id, $run::varchar, $site::varchar) as weights
    from answer_tokens
    semi join of_run using (tree_id)
    where case when step = 0 then 'root' else 'path' end::token_role = $token_role::token_role
),
heads as (
    select token_id, tree_id, unnest(range(len(weights))) as head, unnest(weights) as weights
    from asked
)
select
    head,
    on_path,
    distance,
    count(*) as n,
    avg(weights[3 * edge + 2]) as attention,
    avg(1 / (position_of(token_id) + 1.0)) as even
from heads
join edges using (tree_id)
join nodes on nodes.tree_id = edges.tree_id and nodes.node = edges.target
group by head, on_path, distance
order by head, on_path, distance
