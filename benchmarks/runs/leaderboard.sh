# All published methods, the default model. Half a day on 2 cores.
. "$(dirname "$0")/setup.sh"
ALL=$("$PYTHON" -c "from benchmarks.methods import PUBLISHED; print(*PUBLISHED)")
SHOWN="full $ALL l2norm_dense quest_dense arkvale_dense clusterkv_dense published
    published:keep_factor=inf last_query sentencekv_16bit sentencekv_4bit best_sentences best_tokens"
ask leaderboard_ruler answers ruler --data niah_single_1 niah_multikey_2 vt qa_1 --limit 8 \
    --methods "$SHOWN" "$@"
ask leaderboard_needles answers needles --data walden --count 14 --methods "$SHOWN" "$@"
ask leaderboard_reading reading --data $BOOKS --new-tokens 129 --methods "$SHOWN" "$@"
