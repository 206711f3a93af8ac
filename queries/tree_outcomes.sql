-- tree_outcomes: a run's answer to each tree, and whether the path takes the last edge.
--
-- grain   tree_id
-- params  $run  which run
-- yields  tree_id       the tree
--         depth         edges from root to goal
--         n_steps       predicted steps: depth
--         steps_right   right ones among them, teacher-forced
--         whole_path    all steps are right, teacher-forced
--         greedy        the greedy answer is the path
--         p_least       least probability of a right step
--         last_on_path  the path takes the edge listed last
--
-- Trees are drawn independently, so rows are independent; the steps of one tree are not.
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
