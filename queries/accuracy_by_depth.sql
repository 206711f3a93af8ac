-- accuracy_by_depth: how often a run's model is right, by the depth of the goal.
--
-- grain   depth
-- params  $run  which run
-- yields  depth            edges from root to goal: steps of the path
--         n_trees          trees with a goal at this depth
--         n_steps          steps of their paths
--         step_accuracy    share of steps right, teacher-forced, [0, 1]
--         path_accuracy    share of trees with every step right, teacher-forced, [0, 1]
--         greedy_accuracy  share of trees whose greedy answer is the path, [0, 1]
--
-- The run's trees decide how frequent a depth is. A row over few trees says little: look at n_trees
-- first. Teacher-forced: each step is predicted after the right steps before it.
with steps as (
    select depth, count(*) as n_steps, avg(correct::integer) as step_accuracy
    from predictions
    join trees using (tree_id)
    where run = $run
    group by depth
),
paths as (
    select
        depth,
        count(*) as n_trees,
        avg(teacher_forced_right::integer) as path_accuracy,
        avg(greedy_right::integer) as greedy_accuracy
    from outcomes
    join trees using (tree_id)
    where run = $run
    group by depth
)
select depth, n_trees, n_steps, step_accuracy, path_accuracy, greedy_accuracy
from paths
join steps using (depth)
order by depth
