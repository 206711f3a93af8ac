-- role_counts: how many tokens of each role every set of trees holds.
--
-- grain   dataset, role
-- params  none
-- yields  dataset   name of the set of trees
--         role      what the position is
--         n_tokens  tokens of that role
--         n_trees   trees that have one
--
-- Padding is no token: it has no row and no activation.
select dataset, role, count(*) as n_tokens, count(distinct tree_id) as n_trees
from tokens
group by dataset, role
order by dataset, role
