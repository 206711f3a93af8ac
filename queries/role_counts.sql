-- role_counts: the number of tokens of each role in every set of trees.
--
-- grain   dataset, role
-- params  none
-- yields  dataset   name of the set of trees
--         role      role of the position
--         n_tokens  tokens of that role
--         n_trees   trees that have such a token
--
-- Padding does not count: it has no row and no activation.
select dataset, role, count(*) as n_tokens, count(distinct tree_id) as n_trees
from tokens
group by dataset, role
order by dataset, role
