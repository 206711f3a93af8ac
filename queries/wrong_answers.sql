-- wrong_answers: every tree whose path a run's model does not say, beside what it says.
--
-- grain   tree_id
-- params  $run  which run
-- yields  tree_id               the tree
--         root                  label of the root
--         goal                  label of the goal
--         depth                 edges from root to goal
--         path                  labels from the root's child to the goal, the right answer
--         greedy_path           labels the model steps to when it goes on from its own answers
--         first_wrong_step      the first step it gets wrong, from 0
--         failure               what that step is: 'wrong_child', 'not_a_child' or 'not_a_step'
--         teacher_forced_right  every step is right when the right steps before it are given
--
-- An answer counts as wrong from its first wrong step on, also where it finds back to the goal: there is one right path.
select tree_id, root, goal, depth, path, greedy_path, first_wrong_step, failure, teacher_forced_right
from outcomes
join trees using (tree_id)
where run = $run and not greedy_right
order by tree_id
