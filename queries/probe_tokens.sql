-- probe_tokens: one kind of token of every tree of a run, with all labels that a probe may ask for
-- there.
--
-- grain   token_id
-- params  $run         which run
--         $token_role  'edge_source', 'edge_target', 'separator', 'next_source' or 'path'
-- yields  token_id    where the residual stream is read
--         tree_id     the tree
--         edge        place in the list, from 0, of the labelled edge
--         source      label of the edge's parent node, [0, n_nodes)
--         target      label of the edge's child node, [0, n_nodes)
--         goal        label of the tree's goal
--         on_path     1 if the path from root to goal takes the edge, else 0
--         edge_depth  edges between the root and the edge's source
--         next_node   the node that the next step goes to; NULL but for 'path'
--         token       the word where the residual stream is read
--         position    place of that word in the sequence
--         is_last     the edge is listed last
--         depth       edges from root to goal
--         split       'train' or 'test', the same for all tokens of a tree
--
-- 'separator' belongs to every edge but the last. 'next_source' is the source token of the edge
-- after the labelled edge. 'path' is the root and each step but the last, labelled with the edge of
-- the next step. Tokens of one tree are not independent: split and resample by tree, never by row.
with of_edges as (
    select
        token_at(tree_id, edge, $token_role) as token_id,
        tree_id,
        edge,
        null as next_node
    from edges
    where not (is_last and $token_role in ('separator', 'next_source'))
),
of_path as (
    select token_id, tree_id, edge, next_node
    from answer_tokens
    join edges using (tree_id, step)
    where $token_role = 'path'
),
asked as (
    from of_edges where $token_role in ('edge_source', 'edge_target', 'separator', 'next_source')
    union all
    from of_path
)
select
    token_id,
    tree_id,
    edge,
    source,
    target,
    goal,
    on_path::utinyint as on_path,
    source_depth as edge_depth,
    next_node,
    token,
    position,
    is_last,
    depth,
    split
from asked
join (select token_id, token, position from tokens) using (token_id)
join edges using (tree_id, edge)
join trees using (tree_id)
semi join held_trees($run) using (tree_id)
order by token_id
