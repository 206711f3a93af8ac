-- nearest: the tokens of a run whose activations lie nearest to one token's, at one site.
--
-- grain   rank
-- params  $run       which run
--         $site      where in the network, short or long name
--         $token_id  whose neighbours
--         $n         how many
-- yields  rank      1 is the nearest
--         token_id  the neighbour
--         tree_id   its tree
--         position  its place in the sequence
--         token     what stands there
--         role      what the position is
--         distance  Euclidean, in the model's own units
--         cosine    of the angle between the two activations, [-1, 1]; NaN where one of them is 0
--
-- Every stored token of the run is compared, those of its own tree too; the residual stream is not centred, so that a mean
-- which all tokens share makes every cosine large.
with one as (
    select act($token_id::bigint, $run::varchar, $site::varchar) as x
), near as (
    select a.token_id, a.tree_id, a.position, a.token, a.role, distance(a.x, one.x) as distance, cosine(a.x, one.x) as cosine
    from activations($run::varchar, $site::varchar) a, one
    where a.token_id != $token_id::bigint
    order by distance, a.token_id
    limit $n::bigint
)
select row_number() over (order by distance, token_id) as rank, *
from near
order by rank
