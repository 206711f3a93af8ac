-- loss_by_position: how well a run predicts the next token of text, by the token's place.
--
-- grain   position
-- params  $run  which run
-- yields  position     place of the token that predicts, from 0
--         n_tokens     tokens there whose next token was predicted
--         n_sequences  sequences that they are of
--         mean_loss    mean of -log(p of the right next token), nats
--         accuracy     share of next tokens that are the most probable one, [0, 1]
--
-- Only long sequences have late places, so a row over few sequences compares other texts. Tokens of
-- one sequence are not independent: take intervals over sequences.
select
    position,
    count(*) as n_tokens,
    count(distinct sequence_id) as n_sequences,
    avg(loss) as mean_loss,
    avg(correct::integer) as accuracy
from predictions
join (select token_id, position from tokens) using (token_id)
where run = $run and loss is not null
group by position
order by position
