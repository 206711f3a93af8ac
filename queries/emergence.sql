-- emergence: how the checkpoints of one training answer one set of trees.
--
-- grain   train_step, run
-- params  $dataset  which set of trees
--         $model    name of the trained model; its checkpoints are named MODEL-stepN
-- yields  train_step        training step of the checkpoint; NULL for the trained model itself
--         run               the run
--         n_trees           trees that it answered
--         step_accuracy     share of steps right, teacher-forced, [0, 1]
--         path_accuracy     share of trees with every step right, teacher-forced, [0, 1]
--         greedy_accuracy   share of trees whose greedy answer is the path, [0, 1]
--         first_wrong_step  mean number, from 0, of the first wrong step of wrong greedy answers
--         wrong_at_root     share of trees whose first step is wrong, [0, 1]
--
-- All runs answer the same trees: compare runs tree by tree, not by their intervals. Runs that
-- stopped early have fewer trees: look at n_trees first.
with checkpoints as (
    select
        run,
        model = $model::varchar as trained,
        try_cast(substr(model, length($model) + length('-step') + 1) as bigint) as train_step
    from runs
    join models using (weights_sha256)
    where run not in (select run from interventions) and dataset = $dataset and (model = $model or starts_with(model, $model || '-step'))
),
steps as (
    select run, avg(correct::integer) as step_accuracy
    from predictions
    semi join checkpoints using (run)
    group by run
),
answers as (
    select
        run,
        count(*) as n_trees,
        avg(teacher_forced_right::integer) as path_accuracy,
        avg(greedy_right::integer) as greedy_accuracy,
        avg(first_wrong_step) as first_wrong_step,
        avg(coalesce(first_wrong_step = 0, false)::integer) as wrong_at_root
    from outcomes
    semi join checkpoints using (run)
    group by run
)
select
    case when not trained then train_step end as train_step,
    run,
    n_trees,
    step_accuracy,
    path_accuracy,
    greedy_accuracy,
    first_wrong_step,
    wrong_at_root
from checkpoints
join answers using (run)
join steps using (run)
where trained or train_step is not null
order by train_step, run
