-- baseline_source_listed: guesses an edge's source from the sources listed up to the edge, in
-- proportion to their counts.
--
-- grain   token_id, source
-- params  $run         which run
--         $token_role  'edge_source', 'edge_target', 'separator' or 'next_source'
-- yields  token_id  where a probe reads
--         source    a guess, a label
--         p         its probability, [0, 1]
--
-- Uses the words of the edges up to this one, itself included, without their order: a bag of words.
-- The guess is right at edge 0, and once in e + 1 at edge e, unless a source has two edges.
with asked as (
    select token_at(edges.tree_id, edge, $token_role) as token_id, edges.tree_id, edge
    from edges
    join trees using (tree_id)
    join runs using (dataset)
    where run = $run
    and $token_role in ('edge_source', 'edge_target', 'separator', 'next_source')
    and not (is_last and $token_role in ('separator', 'next_source'))
)
select token_id, listed.source, count(*) / (any_value(asked.edge) + 1.0) as p
from asked
join edges as listed on listed.tree_id = asked.tree_id and listed.edge <= asked.edge
group by token_id, listed.source
order by token_id, listed.source
