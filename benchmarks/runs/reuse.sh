# Layers that take over the choice of an earlier layer: loss and needles, both models. An hour.
. "$(dirname "$0")/setup.sh"
SHOWN="full sentencekv sentencekv:reuse_layers=2 sentencekv:reuse_layers=3 sentencekv:reuse_layers=6"
for model in $MODELS; do
    ask reuse_reading_$model reading --model "$(model_of $model)" --data $BOOKS --places 1/3,1/2 \
        --new-tokens 129 --budgets 96,256 --methods "$SHOWN" "$@"
    ask reuse_needles_$model answers needles --model "$(model_of $model)" --data walden --count 20 \
        --budgets 96,256 --methods "$SHOWN" "$@"
done
