# Needles and RULER's files when each method reads the question token by token, the default model.
. "$(dirname "$0")/setup.sh"
SHOWN="full sentencekv last_query retroinfer shadowkv shotkv snapkv"
ask sparsely_needles answers needles --question sparsely --data walden --count 20 --budgets 256 \
    --methods "$SHOWN" "$@"
ask sparsely_ruler answers ruler --question sparsely --limit 15 --budgets 256 \
    --data niah_single_1 niah_multikey_2 vt qa_1 --methods "$SHOWN" "$@"
