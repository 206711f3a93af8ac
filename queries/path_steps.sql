-- path_steps: each step of each path that a run's model predicted, and where the edge it takes stands in the list.
--
-- grain   tree_id, step
-- params  $run  which run
-- yields  tree_id   the tree
--         step      which step, from 0
--         depth     edges from root to goal
--         edge      place in the list of the edge that the step takes, from 0
--         is_last   it is listed last, so followed by the bar and by no separator
--         correct   the likeliest token was the right one
--         p_target  probability of the right one
--
-- The steps before are given right (teacher-forced), so a step is not charged with an earlier mistake.
select tree_id, step, depth, edge, is_last, correct, p_target
from predictions
join edges using (tree_id, step)
join trees using (tree_id)
where run = $run
order by tree_id, step
