-- ancestors: every ancestor of each edge's target, at the token that writes the target, and whether
-- the edge that leads to the ancestor was listed before.
--
-- grain   token_id, distance
-- params  $run  which run
-- yields  token_id      where the residual stream is read: the edge's target
--         distance      steps up from the target: 1 is the edge's own source, 2 the grandparent
--         tree_id       the tree
--         edge          place in the list, from 0, of the edge whose target it is
--         ancestor      label of the ancestor, [0, n_nodes)
--         edge_above    place in the list of the edge down from the ancestor; at 1 the own edge
--         listed        that edge is the token's own, or listed before
--         chain_listed  so are all edges from the ancestor down to the target
--         is_root       the ancestor is the root
--         split         'train' or 'test', by the tree
--
-- Attention is causal: without `chain_listed` the token cannot know that this node is an ancestor.
-- The rows of one tree are not independent: split and resample by tree, never by row.
with recursive of_run as (
    select tree_id from held_trees($run)
    union
    select tree_id from outcomes where run = $run
),
climbed as (
    select
        tree_id,
        edge,
        1 as distance,
        source as ancestor,
        edge as edge_above,
        true as chain_listed
    from edges
    semi join of_run using (tree_id)
    union all
    select
        climbed.tree_id,
        climbed.edge,
        distance + 1,
        edges.source,
        edges.edge,
        chain_listed and edges.edge < climbed.edge
    from climbed
    join edges on edges.tree_id = climbed.tree_id and edges.target = climbed.ancestor
)
select
    token_at(tree_id, edge, 'edge_target') as token_id,
    distance,
    tree_id,
    edge,
    ancestor,
    edge_above,
    edge_above <= edge as listed,
    chain_listed,
    ancestor = root as is_root,
    split
from climbed
join trees using (tree_id)
order by token_id, distance
