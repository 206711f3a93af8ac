-- accuracy_by_depth: how often a run's model is right, by the depth of the goal.
--
-- grain   depth
-- params  $run  which run
-- yields  depth            edges from root to goal, so steps to be said
--         n_trees          trees with such a goal
--         n_steps          their steps
--         step_accuracy    share of steps right, each given the right steps before it (teacher-forced), [0, 1]
--         path_accuracy    share of trees with every step right, teacher-forced, [0, 1]
--         greedy_accuracy  share of trees whose path the model says when it goes on from its own answers, [0, 1]
--
-- Depths are as frequent as the run's trees have them, so a row of few trees says little: look at n_trees first.
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
