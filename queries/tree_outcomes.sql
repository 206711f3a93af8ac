-- tree_outcomes: how a run's model did on each tree, and where its path lies in the list of edges.
--
-- grain   tree_id
-- params  $run  which run
-- yields  tree_id       the tree
--         depth         edges from root to goal
--         n_steps       steps that were predicted: depth
--         steps_right   of these, how many were right, each given the right steps before it
--         whole_path    all of them were
--         greedy        the answer is right when the model goes on from its own steps
--         p_least       probability of the right step where it was least
--         last_on_path  the path takes the edge listed last
--
-- Rows are trees, drawn one by one, so they are independent of each other; the steps of one tree are not.
with graded as (
    select tree_id, count(*) as n_steps, sum(correct::int) as steps_right, min(p_target) as p_least
    from predictions
    where run = $run
    group by tree_id
)
select
    tree_id,
    depth,
    n_steps,
    steps_right::int as steps_right,
    teacher_forced_right as whole_path,
    greedy_right as greedy,
    p_least,
    on_path as last_on_path
from outcomes
join graded using (tree_id)
join trees using (tree_id)
join edges using (tree_id)
where run = $run and is_last
order by tree_id
