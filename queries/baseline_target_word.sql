-- baseline_target_word: guesses an edge's target at the target token, from the token's own word.
--
-- grain   token_id, target
-- params  $run         which run
--         $token_role  'edge_target'; other roles give no rows
-- yields  token_id  where a probe reads
--         target    the guess, a label
--         p         its probability, 1
--
-- Uses the token alone. No network is needed to read the word: a probe that finds it has found the
-- embedding.
select token_at(edges.tree_id, edge, 'edge_target') as token_id, target, 1.0::double as p
from edges
join trees using (tree_id)
join runs using (dataset)
where run = $run and $token_role = 'edge_target'
order by token_id
