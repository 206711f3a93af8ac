-- info: what a store holds, one row per run.
with
    stored as (
        select run, count(distinct site) as n_sites, sum(bytes) as bytes, max(batch) + 1 as n_batches
        from shards group by run
    ),
    named as (
        select run, string_agg(short, ' ' order by rowid) as sites from sites group by run
    ),
    graded as (
        select run, count(*) as n_trees, avg(greedy_right::int) as right from outcomes group by run
        union all
        select run, count(distinct tree_id), null  -- edited runs may hold next tokens alone
        from predictions where run in (from (select run from interventions) anti join outcomes using (run)) group by run
        union all
        select run, count(distinct tree_id), null from generations group by run  -- continuations are not graded
    ),
    counted as (
        select trees.dataset, count(*) as n_tokens from tokens join trees using (tree_id) group by trees.dataset
    )
select
    run,
    system,
    left(weights_sha256, 12) as weights,
    dataset,
    coalesce(graded.n_trees, 0) as trees,
    runs.n_trees as planned,
    coalesce(n_tokens, 0) as dataset_tokens,
    sites,
    round(coalesce(bytes, 0) / 1e9, 3) as gigabytes,
    round(100 * graded.right, 2) as greedy_right_percent
from runs
join models using (weights_sha256)
left join named using (run)
left join stored using (run)
left join graded using (run)
left join counted using (dataset)
order by runs.rowid
