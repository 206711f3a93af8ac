-- accuracy_by_child_first: is a run's model better where more edges of the path are listed after
-- the next edge of the path, per goal depth?
--
-- grain   depth, n_child_first
-- params  $run  which run
-- yields  depth            edges from root to goal
--         n_child_first    edges of the path that are listed after the edge below, 0 to depth - 1
--         n_trees          trees of this depth and number
--         path_accuracy    share with every step right, teacher-forced, [0, 1]
--         greedy_accuracy  share whose greedy answer is the path, [0, 1]
--
-- A longer path has more such edges and is harder: compare rows of one depth only. Where all edges
-- are listed child-first, the list walks the path from the goal up.
with listed as (
    select tree_id, edge, lead(edge) over (partition by tree_id order by step) as edge_below
    from edges
    where on_path
),
counted as (
    select tree_id, count(*) filter (where edge_below < edge) as n_child_first
    from listed
    group by tree_id
)
select
    depth,
    n_child_first,
    count(*) as n_trees,
    avg(teacher_forced_right::integer) as path_accuracy,
    avg(greedy_right::integer) as greedy_accuracy
from outcomes
join trees using (tree_id)
join counted using (tree_id)
where run = $run
group by depth, n_child_first
order by depth, n_child_first
