-- causal_directions: each token of one kind, how far its activation points to its right class and
-- to the strongest wrong class of a recorded probe, and the vector that swaps the two.
--
-- grain   token_id
-- params  $run         which run
--         $site        the site, short name
--         $token_role  'edge_source', 'edge_target', 'separator', 'next_source' or 'path'
--         $label       'source', 'target', 'goal', 'on_path', 'edge_depth' or 'next_node'
-- yields  token_id          where the activation is edited
--         tree_id           the tree
--         class             the right class
--         wrong_class       the wrong class with the highest logit
--         projection        signed length of the activation along the right class's direction
--         wrong_projection  signed length along the wrong class's direction
--         margin            logit of the right class less that of the wrong one
--         vector            FLOAT[], d_model numbers: added, it turns the margin into its negative
--         split             'train' or 'test': the probe was fitted to the tokens of 'train'
--
-- The directions are those that the study `probes` recorded last for this run, site, kind of token
-- and label. Without them there is no row; a token whose class the probe does not know has none. A
-- class's own direction is known up to a vector that all classes share, the difference of two
-- exactly. `vector` lies along the difference: as a patch, `add` swaps the two logits, and
-- `project` takes the difference out.
with of_edges as (
    select token_at(tree_id, edge, $token_role) as token_id, tree_id, edge, null as next_node
    from edges
    where not (is_last and $token_role in ('separator', 'next_source'))
    and $token_role in ('edge_source', 'edge_target', 'separator', 'next_source')
),
of_path as (
    select token_id, tree_id, edge, next_node
    from answer_tokens
    join edges using (tree_id, step)
    where $token_role = 'path'
),
asked as (
    select
        token_id,
        tree_id,
        split,
        case $label
            when 'source' then source
            when 'target' then target
            when 'goal' then goal
            when 'on_path' then on_path::smallint
            when 'edge_depth' then source_depth
            when 'next_node' then next_node
        end::varchar as class
    from (from of_edges union all from of_path)
    join edges using (tree_id, edge)
    join trees using (tree_id)
    semi join held_trees($run) using (tree_id)
),
recorded as (
    select name, split_part(name, '=', -1) as class, value
    from latest_results
    where study = 'probes' and metric = 'direction' and run = $run and site = $site
    and token_role = $token_role and label = $label
    qualify row_number() over (partition by name order by recorded desc) = 1
),
classes as materialized (
    select class, value, probe_direction(name) as direction
    from recorded
),
logits as (
    select
        token_id,
        tree_id,
        split,
        asked.class,
        classes.class as other,
        dot(x, direction) + value as logit,
        project(x, direction) as projection
    from (select *, act(token_id, $run::varchar, $site::varchar) as x from asked) as asked
    cross join classes
),
compared as (
    select
        token_id,
        tree_id,
        split,
        class,
        max(logit) filter (where other = class) as logit,
        max(projection) filter (where other = class) as projection,
        max({'logit': logit, 'class': other, 'projection': projection})
            filter (where other != class) as wrong
    from logits
    group by token_id, tree_id, split, class
),
pairs as (
    select
        a.class,
        b.class as wrong_class,
        list_zip(a.direction, b.direction) as sides,
        list_transform(sides, lambda pair: pair[1] - pair[2]) as difference,
        pow(distance(a.direction, b.direction), 2) as squared
    from classes as a
    join classes as b on a.class != b.class
)
select
    token_id,
    tree_id,
    compared.class,
    wrong_class,
    projection,
    wrong.projection as wrong_projection,
    logit - wrong.logit as margin,
    list_transform(difference, lambda v: (v * -2 * margin / squared)::float) as vector,
    split
from compared
join pairs on pairs.class = compared.class and pairs.wrong_class = wrong.class
order by token_id
