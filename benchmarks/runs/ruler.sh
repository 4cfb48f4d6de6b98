# RULER's own files, 15 rows each, both models. An hour and a half on 2 cores.
. "$(dirname "$0")/setup.sh"
for model in $MODELS; do
    ask ruler_$model answers ruler --model "$(model_of $model)" --limit 15 --budgets 256 \
        --data niah_single_1 niah_multikey_2 vt qa_1 --methods "$BOTH" "$@"
done
