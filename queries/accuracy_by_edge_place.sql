-- accuracy_by_edge_place: is a run's model worse where the path takes the last edge, per goal
-- depth?
--
-- grain   depth, last_on_path
-- params  $run  which run
-- yields  depth            edges from root to goal
--         last_on_path     the path takes the edge listed last
--         n_trees          trees of this depth and kind
--         path_accuracy    share with every step right, teacher-forced, [0, 1]
--         greedy_accuracy  share whose greedy answer is the path, [0, 1]
--
-- A longer path is harder and also likelier to take the last edge: compare the two rows of one
-- depth only.
select
    depth,
    on_path as last_on_path,
    count(*) as n_trees,
    avg(teacher_forced_right::integer) as path_accuracy,
    avg(greedy_right::integer) as greedy_accuracy
from outcomes
join trees using (tree_id)
join edges using (tree_id)
where run = $run and is_last
group by depth, on_path
order by depth, last_on_path
