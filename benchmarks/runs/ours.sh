# The default, in 8 bits, on the prompts of leaderboard.sh and of budgets.sh.
. "$(dirname "$0")/setup.sh"
OURS="full sentencekv"
ask ours_ruler answers ruler --data niah_single_1 niah_multikey_2 vt qa_1 --limit 8 \
    --methods "$OURS" "$@"
ask ours_needles answers needles --data walden --count 40 --budgets 96,128,192,256,512 \
    --methods "$OURS" "$@"
ask ours_reading reading --data $BOOKS --places 1/3,2/3 --budgets 96,192,256,512 --methods "$OURS" "$@"
ask ours_reading_on reading --data $BOOKS --new-tokens 129 --methods "$OURS" "$@"
