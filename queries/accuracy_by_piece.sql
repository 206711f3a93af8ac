-- accuracy_by_piece: how often a run predicts each piece of text where it is the next token.
--
-- grain   piece
-- params  $run  which run
-- yields  piece        the right next token, as the tokenizer spells it
--         n_tokens     how often it is the next token
--         n_sequences  sequences where it is
--         accuracy     share of these where it is the most probable token, [0, 1]
--         mean_loss    mean of -log(p of the piece), nats
--         mean_rank    mean number of tokens that are more probable
--
-- Pieces differ in frequency by orders of magnitude, so a row over few tokens says little: look at
-- n_tokens first. Tokens of one sequence are not independent: take intervals over sequences.
select
    target::varchar as piece,
    count(*) as n_tokens,
    count(distinct sequence_id) as n_sequences,
    avg(correct::integer) as accuracy,
    avg(loss) as mean_loss,
    avg(rank) as mean_rank
from predictions
where run = $run and loss is not null
group by piece
order by piece
