# Settings of SentenceKV at several budgets, both models, to compare at equal bytes of the device.
. "$(dirname "$0")/setup.sh"
SHOWN="full sentencekv sentencekv:kv_bits=16 sentencekv:query_decay=0 sentencekv:query_decay=0.5
    sentencekv:sentence_limit=32"
for model in $MODELS; do
    ask bytes_reading_$model reading --model "$(model_of $model)" --data $BOOKS --places 1/2,1/3 \
        --new-tokens 129 --budgets 64,128,320,832 --methods "$SHOWN" "$@"
    ask bytes_long_$model reading --model "$(model_of $model)" --data $BOOKS --length 7500 \
        --new-tokens 129 --budgets 192,320,832,2112 \
        --methods "full sentencekv sentencekv:kv_bits=16 sentencekv:query_decay=0.5" "$@"
    count=40; [ $model = smollm2 ] || count=10
    ask bytes_needles_$model answers needles --model "$(model_of $model)" --data walden --count $count \
        --budgets 80,128,400,1024 --methods "full sentencekv sentencekv:kv_bits=16" "$@"
done
