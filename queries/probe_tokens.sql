-- probe_tokens: one kind of token of every tree that a run holds, labelled with all that a probe may be asked for there.
--
-- grain   token_id
-- params  $run         which run
--         $token_role  'edge_source', 'edge_target', 'separator', 'next_source' or 'path'
-- yields  token_id    where the residual stream is read
--         tree_id     the tree
--         edge        place in the list, from 0, of the edge that is asked about
--         source      label of that edge's parent node, [0, n_nodes)
--         target      label of its child node, [0, n_nodes)
--         goal        label of the tree's goal
--         on_path     1 where the way from root to goal takes that edge, 0 where it does not
--         edge_depth  edges between the root and the edge's source
--         next_node   the node that the next step goes to, of 'path' alone
--         token       what stands where the residual stream is read
--         position    its place in the sequence
--         is_last     the edge is listed last
--         depth       of the goal, edges from the root
--         split       'train' or 'test', the same for all tokens of a tree
--
-- 'separator' is of every edge but the last, 'next_source' the source token of the edge listed behind the one asked about, 'path'
-- the root and each step but the last, asked about the edge that the next step takes.
-- Tokens of one tree are not independent of each other: split and resample by tree, never by row.
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
