-- nearest: the tokens of a run whose activations are nearest to one token's, at one site.
--
-- grain   rank
-- params  $run       which run
--         $site      the site, short or long name
--         $token_id  the token whose neighbours are wanted
--         $n         number of neighbours
-- yields  rank      1 is the nearest
--         token_id  the neighbour
--         tree_id   the neighbour's tree
--         position  the neighbour's place in the sequence
--         token     the neighbour's word
--         role      role of the position
--         distance  Euclidean, in the model's own units
--         cosine    cosine of the two activations, [-1, 1]; NaN if one of them is 0
--
-- Every stored token of the run is compared, also those of the same tree. The residual stream is
-- not centred: a mean that all tokens share makes every cosine large.
with wanted as (
    select act($token_id::bigint, $run::varchar, $site::varchar) as x
), near as (
    select a.token_id, a.tree_id, a.position, a.token, a.role, distance(a.x, wanted.x) as distance, cosine(a.x, wanted.x) as cosine
    from activations($run::varchar, $site::varchar) a, wanted
    where a.token_id != $token_id::bigint
    order by distance, a.token_id
    limit $n::bigint
)
select row_number() over (order by distance, token_id) as rank, *
from near
order by rank
