-- info: what a store holds, one row per run.
with
    stored as (
        select run, count(distinct site) as n_sites, sum(bytes) as bytes, max(batch) + 1 as n_batches
        from shards group by run
    ),
    named as (
        select run, string_agg(short, ' ') as sites from sites group by run
    ),
    graded as (
        select run, count(*) as n_sequences, avg(greedy_right::int) as right from outcomes group by run
        union all
        select run, count(distinct sequence_id), null  -- of text, and of edited runs: next tokens alone
        from predictions where run not in (select run from outcomes) group by run
        union all
        select run, count(distinct sequence_id), null from generations group by run  -- continuations are not graded
    ),
    begun as (  -- of runs without answers: those of the batches of a site
        select run, max(n) as n_sequences
        from (select run, site, sum(n_trees) as n from shards group by all) group by run
    ),
    counted as (
        select dataset, count(*) as n_tokens from tokens group by dataset
    )
select
    run,
    system,
    left(weights_sha256, 12) as weights,
    runs.dataset,
    coalesce(graded.n_sequences, begun.n_sequences, 0)::bigint as sequences,
    datasets.n_sequences::integer as planned,
    coalesce(counted.n_tokens, 0) as dataset_tokens,
    sites,
    nullif(concat_ws(', ',  -- dtype and codec of the run's own sites; null for float32 without a codec
        nullif(regexp_extract(versions, '"dtype": "([a-z0-9]+)"', 1), ''),
        nullif(regexp_extract(versions, '"codec": "([a-z0-9]+)"', 1), '')
    ), '') as stored_as,
    round(coalesce(bytes, 0) / 1e9, 3) as gigabytes,
    round(100 * graded.right, 2) as greedy_right_percent
from runs
join models using (weights_sha256)
join datasets using (dataset)
left join named using (run)
left join stored using (run)
left join graded using (run)
left join begun using (run)
left join counted on counted.dataset = runs.dataset
order by runs.rowid
