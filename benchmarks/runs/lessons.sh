# The runs that lessons show. Two minutes on 2 cores.
. "$(dirname "$0")/setup.sh"
ask lessons lessons
ask lesson_score answers needles --families multikey --count 10 --data examples/walden_house.txt \
    --length 2000 --budgets 64 \
    --methods "full sentencekv:score=mean_query sentencekv:score=gaussian best_sentences best_tokens"
