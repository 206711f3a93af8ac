-- matched_failures: each tree whose greedy answer is wrong, beside trees of the same depth, height
-- and number of leaves that a run's model gets right.
--
-- grain   tree_id, match
-- params  $run   which run
--         $n     right trees per wrong one, at most: 20 for 1 : 20
--         $seed  whole number that the draw depends on
-- yields  tree_id        tree with a wrong answer
--         match          number of the match, from 0; NULL for a tree without any
--         right_tree_id  tree with a right answer; NULL for a tree without any
--         depth          edges from root to goal, of both
--         height         edges from root to the deepest leaf, of both
--         n_leaves       leaves, of both
--
-- No right tree is used twice. Wrong trees of one kind share the right ones evenly, and have fewer
-- than $n each where too few are right: give each wrong tree's matches a weight of 1 together, or
-- leave out the kinds that lack some.
with drawn as (
    select
        tree_id,
        greedy_right,
        depth,
        height,
        n_leaves,
        md5(concat_ws('/', $seed::bigint, tree_id)) as draw,
        row_number() over (alike order by draw, tree_id) - 1 as place,
        count(*) over alike as n_alike
    from outcomes
    join trees using (tree_id)
    where run = $run
    window alike as (partition by greedy_right, depth, height, n_leaves)
),
wrong as (
    from drawn
    where not greedy_right
),
kinds as (
    select distinct depth, height, n_leaves, n_alike as n_wrong
    from wrong
),
matches as (  -- the right trees of a kind are dealt to its wrong ones in turn
    select
        depth,
        height,
        n_leaves,
        drawn.place % n_wrong as place,
        drawn.place // n_wrong as match,
        drawn.tree_id as right_tree_id
    from drawn
    join kinds using (depth, height, n_leaves)
    where greedy_right and drawn.place // n_wrong < $n::bigint
)
select tree_id, match, right_tree_id, depth, height, n_leaves
from wrong
left join matches using (depth, height, n_leaves, place)
order by tree_id, match
