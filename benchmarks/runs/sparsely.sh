# Needles and RULER's files when each method reads the question token by token, both models.
. "$(dirname "$0")/setup.sh"
SHOWN="full sentencekv last_query retroinfer shadowkv shotkv snapkv"
for model in $MODELS; do
    ask sparsely_needles_$model answers needles --model "$(model_of $model)" --question sparsely \
        --data walden --count 20 --budgets 256 --methods "$SHOWN" "$@"
    ask sparsely_ruler_$model answers ruler --model "$(model_of $model)" --question sparsely \
        --limit 15 --budgets 256 --data niah_single_1 niah_multikey_2 vt qa_1 --methods "$SHOWN" "$@"
done
