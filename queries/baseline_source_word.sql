-- baseline_source_word: guesses an edge's source at the source token, from the token's own word.
--
-- grain   token_id, source
-- params  $run         which run
--         $token_role  'edge_source'; other roles give no rows
-- yields  token_id  where a probe reads
--         source    the guess, a label
--         p         its probability, 1
--
-- Uses the token alone. No network is needed to read the word: a probe that finds it has found the
-- embedding.
select token_at(edges.tree_id, edge, 'edge_source') as token_id, source, 1.0::double as p
from edges
join trees using (tree_id)
join runs using (dataset)
where run = $run and $token_role = 'edge_source'
order by token_id
