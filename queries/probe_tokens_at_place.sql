-- probe_tokens_at_place: one kind of token at one place in the list of edges, with the labels that
-- a probe may ask for there.
--
-- grain   token_id
-- params  $run         which run
--         $token_role  'edge_source', 'edge_target', 'separator' or 'next_source'
--         $place       place of the edge, from 0; from the end, -1 is the edge listed last
-- yields  token_id       where the residual stream is read
--         tree_id        the tree
--         edge           place in the list, from 0, of the labelled edge: the same in every row
--         source         label of the edge's parent node, [0, n_nodes)
--         target         label of the edge's child node, [0, n_nodes)
--         goal           label of the tree's goal
--         on_path        1 if the path from root to goal takes the edge, else 0
--         edge_depth     edges between the root and the edge's source
--         source_listed  the edge into the source is listed before; false for the root
--         depth          edges from root to goal
--         split          'train' or 'test', by the tree
--
-- All rows have one position, so a probe cannot read the place for the label. 'separator' and
-- 'next_source' have no rows at the last edge. There is one row per tree: rows are independent.
with of_run as (
    select tree_id from held_trees($run)
    union
    select tree_id from outcomes where run = $run
),
asked as (
    select edges.*, goal, depth, split
    from edges
    join trees using (tree_id)
    join datasets using (dataset)
    semi join of_run using (tree_id)
    where edge = $place::bigint + case when $place::bigint < 0 then n_nodes - 1 else 0 end
    and $token_role in ('edge_source', 'edge_target', 'separator', 'next_source')
    and not (is_last and $token_role in ('separator', 'next_source'))
)
select
    token_at(asked.tree_id, asked.edge, $token_role) as token_id,
    asked.tree_id,
    asked.edge,
    asked.source,
    asked.target,
    goal,
    asked.on_path::utinyint as on_path,
    asked.source_depth as edge_depth,
    coalesce(above.edge < asked.edge, false) as source_listed,
    depth,
    split
from asked
left join edges as above on above.tree_id = asked.tree_id and above.target = asked.source
order by token_id
