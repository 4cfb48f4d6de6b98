# Eight questions of each of eight documents, both models.
. "$(dirname "$0")/setup.sh"
for model in $MODELS; do
    ask requests_$model requests --model "$(model_of $model)" --data walden --count 8 \
        --budgets 256 --methods "$BOTH snapkv:sees=nothing chunkkv:sees=nothing" "$@"
done
