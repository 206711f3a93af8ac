-- two_inner_children: how often a run's model is right where the path goes on from a node with two
-- inner children, by step.
--
-- grain   step
-- params  $run  which run
-- yields  step      number of the step along the path, from 0
--         n_steps   such steps, one per tree
--         accuracy  share of them right, teacher-forced, [0, 1]
--         sibling   share of them where the likeliest token is the other child, [0, 1]
--         p_target  mean probability of the right token, [0, 1]
--
-- An inner child has children. Elsewhere a model can leave out children that are leaves, or go to
-- the goal. Here neither helps, and a guess among the children is right half the time.
with inner_children as (
    select tree_id, source, target
    from edges
    semi join edges as below on below.tree_id = edges.tree_id and below.source = edges.target
),
pairs as (
    select tree_id, source, sum(target) as both_targets
    from inner_children
    group by tree_id, source
    having count(*) = 2
)
select
    step,
    count(*) as n_steps,
    avg(correct::integer) as accuracy,
    avg((predicted::varchar = '→' || (both_targets - edges.target))::integer) as sibling,
    avg(p_target) as p_target
from predictions
join edges using (tree_id, step)
join pairs using (tree_id, source)
where run = $run
group by step
order by step
