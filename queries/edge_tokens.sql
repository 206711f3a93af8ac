-- edge_tokens: one kind of token of every edge that a run holds, labelled with the edge's nodes.
--
-- grain   token_id
-- params  $run         which run
--         $token_role  'edge_source', 'edge_target', 'separator' (every edge but the last) or 'bar' (the last edge)
-- yields  token_id  where the residual stream is read
--         tree_id   the tree
--         edge      place in the list, from 0
--         source    label of the edge's parent node, [0, n_nodes)
--         target    label of its child node, [0, n_nodes)
--         on_path   the way from root to goal takes this edge
--         is_last   the edge listed last
--         depth     of the goal, edges from the root
--         split     'train' or 'test', the same for all edges of a tree
--
-- Edges of one tree are not independent of each other: split and resample by tree, never by row.
select token_id, tree_id, edge, source, target, on_path, is_last, depth, split
from tokens
join edges using (tree_id, edge)
join trees using (tree_id)
semi join held_trees($run) using (tree_id)
where role = $token_role::token_role
order by token_id
