-- wrong_answers: every tree whose greedy answer is wrong, with that answer.
--
-- grain   tree_id
-- params  $run  which run
-- yields  tree_id               the tree
--         root                  label of the root
--         goal                  label of the goal
--         depth                 edges from root to goal
--         path                  labels from the root's child to the goal, the right answer
--         greedy_path           labels of the greedy answer's steps
--         first_wrong_step      number of the first wrong step, from 0
--         failure               kind of that step: 'wrong_child', 'not_a_child' or 'not_a_step'
--         teacher_forced_right  every step is right after the right steps before it
--
-- An answer is wrong from its first wrong step on, even if it later reaches the goal: there is one
-- right path.
select tree_id, root, goal, depth, path, greedy_path, first_wrong_step, failure, teacher_forced_right
from outcomes
join trees using (tree_id)
where run = $run and not greedy_right
order by tree_id
