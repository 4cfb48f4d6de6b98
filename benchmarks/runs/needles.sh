# Needles, single and among four, 20 each, both models. An hour on 2 cores.
. "$(dirname "$0")/setup.sh"
for model in $MODELS; do
    ask needles_$model answers needles --model "$(model_of $model)" --data walden --count 20 \
        --budgets 256 --methods "$BOTH" "$@"
done
