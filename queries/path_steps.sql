-- path_steps: each predicted step of each path, and the place in the list of the edge that the step
-- takes.
--
-- grain   tree_id, step
-- params  $run  which run
-- yields  tree_id   the tree
--         step      number of the step, from 0
--         depth     edges from root to goal
--         edge      place in the list of the edge that the step takes, from 0
--         is_last   that edge is listed last, so a bar follows it, not a separator
--         correct   the likeliest token is the right one
--         p_target  probability of the right token
--
-- The steps before are the right ones (teacher-forced), so a step is not charged with earlier
-- mistakes.
select tree_id, step, depth, edge, is_last, correct, p_target
from predictions
join edges using (tree_id, step)
join trees using (tree_id)
where run = $run
order by tree_id, step
