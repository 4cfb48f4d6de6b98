# Read by the other scripts. They take the inputs from the folder SENTENCEKV_DATA, write to the folder
# RESULTS, do only what is missing there, and hand their options on: `--limit 2` makes a small table.
set -e
cd "$(dirname "$0")/../.."
: "${RESULTS:=benchmarks/results}" "${PYTHON:=.venv/bin/python}" "${MODELS:=smollm2 qwen2.5}"
BOOKS="walden room_with_view sherlock_holmes tale_of_two_cities"
BOTH="full sentencekv published published:keep_factor=inf last_query snapkv chunkkv quest shadowkv
    retroinfer best_sentences best_tokens"  # of both models

model_of() {  # NAME in a file of results
    case $1 in smollm2) echo smollm2-135m-instruct ;; qwen2.5) echo qwen2.5-coder-0.5b ;; esac
}

ask() {  # FILE of results, program, its options
    file=$1; program=$2; shift 2
    "$PYTHON" -m "benchmarks.$program" "$@" --out "$RESULTS/$file.jsonl"
}
