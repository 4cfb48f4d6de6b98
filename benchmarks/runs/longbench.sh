# LongBench, up to six rows a task, both models; then 20 rows of two Chinese tasks, the second model.
. "$(dirname "$0")/setup.sh"
for model in $MODELS; do
    ask longbench_$model answers longbench --model "$(model_of $model)" --limit 6 --budgets 256 \
        --data qasper hotpotqa 2wikimqa trec triviaqa samsum lcc multi_news --methods "$BOTH" "$@"
done
ask longbench_zh_qwen2.5 answers longbench --model qwen2.5-coder-0.5b --limit 20 --budgets 256 \
    --data multifieldqa_zh passage_retrieval_zh --methods "$BOTH" "$@"
