-- failures_by_other_subtree: does a run's model fail more often where the root's other subtree is
-- deep, per goal depth?
--
-- grain   depth, other_depth
-- params  $run  which run
-- yields  depth        edges from root to goal
--         other_depth  edges from root to the other subtree's deepest leaf; 0 without a subtree
--         n_trees      trees of both depths
--         n_wrong      trees whose greedy answer is wrong
--         n_into       wrong answers that begin with the root's other child
--         failures     n_wrong / n_trees, [0, 1]
--
-- The other subtree hangs on the root's child that is not on the path. A tree has a fixed number of
-- nodes, so a deep goal leaves few for the other subtree: compare rows of one depth only.
with recursive of_run as (
    select tree_id
    from outcomes
    where run = $run
),
other as (  -- the edges of the subtree
    select tree_id, target, 1 as target_depth
    from edges
    semi join of_run using (tree_id)
    where source_depth = 0 and not on_path
    union all
    select edges.tree_id, edges.target, target_depth + 1
    from other
    join edges on edges.tree_id = other.tree_id and edges.source = other.target
),
deepest as (
    select tree_id, max(target_depth) as other_depth
    from other
    group by tree_id
)
select
    depth,
    coalesce(other_depth, 0) as other_depth,
    count(*) as n_trees,
    count(*) filter (where not greedy_right) as n_wrong,
    count(*) filter (where first_wrong_step = 0 and failure = 'wrong_child') as n_into,
    avg((not greedy_right)::integer) as failures
from outcomes
join trees using (tree_id)
left join deepest using (tree_id)
where run = $run
group by all
order by depth, other_depth
