# The loss in reading on, two passages of each book, both models. Forty minutes on 2 cores.
. "$(dirname "$0")/setup.sh"
for model in $MODELS; do
    ask reading_$model reading --model "$(model_of $model)" --data $BOOKS --places 1/3,1/2 \
        --new-tokens 129 --budgets 256 --methods "$BOTH" "$@"
done
