-- edge_tokens: one kind of token of every edge of a run, labelled with the edge's nodes.
--
-- grain   token_id
-- params  $run         which run
--         $token_role  'edge_source', 'edge_target', 'separator' or 'bar' (only after the last edge)
-- yields  token_id  where the residual stream is read
--         tree_id   the tree
--         edge      place in the list, from 0
--         source    label of the edge's parent node, [0, n_nodes)
--         target    label of the edge's child node, [0, n_nodes)
--         on_path   the path from root to goal takes this edge
--         is_last   the edge listed last
--         depth     edges from root to goal
--         split     'train' or 'test', the same for all edges of a tree
--
-- Edges of one tree are not independent: split and resample by tree, never by row.
select token_id, tree_id, edge, source, target, on_path, is_last, depth, split
from tokens
join edges using (tree_id, edge)
join trees using (tree_id)
semi join held_trees($run) using (tree_id)
where role = $token_role::token_role
order by token_id
