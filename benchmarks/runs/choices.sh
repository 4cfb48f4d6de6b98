# The default with one choice changed, on other data than is reported, the default model.
. "$(dirname "$0")/setup.sh"
SHOWN="full plain sentencekv_16bit sentencekv_16bit:secondary_sinks=0 sentencekv_16bit:query_decay=1
    sentencekv_16bit:secondary_sinks=4 sentencekv_16bit:secondary_sinks=16
    sentencekv_16bit:secondary_ratio=9 sentencekv_16bit:sentence_limit=32
    sentencekv_16bit:sentence_limit=128 sentencekv_16bit:unit=chunk16 sentencekv_16bit:keep_factor=3"
ask choices_reading reading --data $BOOKS --places 0.85 --new-tokens 129 --budgets 192,512 \
    --methods "$SHOWN" "$@"
ask choices_needles answers needles --families multikey --seed 7 --data sherlock_holmes --count 20 \
    --methods "$SHOWN" "$@"
