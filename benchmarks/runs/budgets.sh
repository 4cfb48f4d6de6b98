# A few methods at four budgets, the default model: 40 needles of each kind, two passages a book.
. "$(dirname "$0")/setup.sh"
SHOWN="full snapkv chunkkv expected_attention quest quest_dense shadowkv published
    published:keep_factor=3 published:keep_factor=inf plain sentencekv_16bit best_sentences best_tokens"
ask budgets_needles answers needles --data walden --count 40 --budgets 96,192,256,512 \
    --methods "$SHOWN" "$@"
ask budgets_reading reading --data $BOOKS --places 1/3,2/3 --budgets 96,192,256,512 \
    --methods "$SHOWN streamingllm l2norm pyramidkv" "$@"
