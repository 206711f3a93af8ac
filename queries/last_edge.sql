-- last_edge: the target token of each prompt's last edge, labelled with the edge's nodes.
--
-- grain   tree_id
-- params  $run    which run
--         $split  'train' or 'test'
-- yields  tree_id   the tree
--         token_id  where the residual stream is read
--         source    label of the edge's parent node, [0, n_nodes)
--         target    label of the edge's child node, [0, n_nodes)
--         on_path   the path from root to goal takes this edge
--
-- Attention is causal, so only the last edge's tokens can have read every other edge.
select tree_id, token_id, source, target, on_path
from edge_targets
semi join held_trees($run) using (tree_id)
where is_last and split = $split::tree_split
order by tree_id
