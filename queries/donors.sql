-- donors: for each tree of a run, other trees of its dataset whose path has the same node at one
-- distance from the goal.
--
-- grain   tree_id, sample
-- params  $run       which run
--         $distance  steps up the path from the goal, 0 or more; 0 compares the goals
--         $backward  true: trees that list every edge after all the edges below it; false: all
--         $second    least depth of the deepest leaf of the clean root's other subtree; 0: all
--         $n         samples per tree, 1 or more
--         $seed      whole number that the draw depends on
-- yields  tree_id         the clean tree
--         sample          number of the sample, from 0
--         token_id        the clean tree's root token, the first of its path
--         donor_tree_id   the other tree
--         donor_token_id  the other tree's root token
--         node            label that both paths have at the distance
--         depth           edges from root to goal in the clean tree
--         donor_depth     edges from root to goal in the other tree
--
-- Past a clean path's end the root's child is repeated, and a donor's path is longer than the
-- distance. Nothing else is matched. Brinkmann et al. scrub with $backward true and $second 2. The
-- donors of a tree are distinct, and each one is a uniform draw; a tree with fewer than $n has
-- fewer rows. A donor serves several trees: take intervals over clean trees.
with recursive of_run as (
    select tree_id from held_trees($run)
    union
    select tree_id from outcomes where run = $run
),
other as (  -- the edges of the root's subtree without the goal
    select tree_id, target, 1 as target_depth
    from edges
    semi join of_run using (tree_id)
    where source_depth = 0 and not on_path
    union all
    select edges.tree_id, edges.target, target_depth + 1
    from other
    join edges on edges.tree_id = other.tree_id and edges.source = other.target
),
second as (
    select tree_id, max(target_depth) as other_depth
    from other
    group by tree_id
),
known as (
    select
        tree_id,
        tree_id::bigint * 256 + 3 * n_nodes - 1 as token_id,
        depth,
        path[greatest(depth - $distance::bigint, 1)] as node,
        coalesce(other_depth, 0) as other_depth
    from trees
    join datasets using (dataset)
    semi join of_run using (tree_id)
    left join second using (tree_id)
    where backward or not $backward::boolean
),
donors as (
    select
        *,
        md5(concat_ws('/', $seed::bigint, $distance::bigint, tree_id)) as drawn,
        row_number() over (alike order by drawn, tree_id) - 1 as place,
        count(*) over alike as n_donors
    from known
    where depth > $distance::bigint
    window alike as (partition by node)
),
cells as (
    select distinct node, n_donors
    from donors
),
clean as (  -- a clean tree that is a donor itself is left out of its own donors
    select
        known.*,
        n_donors,
        own.place as own_place,
        n_donors - (own.place is not null)::int as n_others,
        md5_number_lower(concat_ws('/', $seed::bigint, $distance::bigint, known.tree_id, 'first')) as drawn
    from known
    join cells using (node)
    left join (select tree_id, place from donors) as own using (tree_id)
    where other_depth >= $second::bigint
),
samples as (
    select
        *,
        unnest(range(least($n::bigint, n_others))) as sample,
        coalesce(own_place + 1, 0) + (drawn % n_others + sample) % n_others as turn
    from clean
    where n_others > 0
)
select
    samples.tree_id,
    sample,
    samples.token_id,
    donors.tree_id as donor_tree_id,
    donors.token_id as donor_token_id,
    node,
    samples.depth,
    donors.depth as donor_depth
from samples
join donors using (node)
where donors.place = turn % samples.n_donors
order by samples.tree_id, sample
