# What is not measured on a GPU yet, in some nine minutes of an H200: the tests, times, the kernels of
# replayed graphs, 512k tokens (64 GiB of pinned memory). A step whose rows are there is left out, and
# STEPS chooses some. `--rehearse` takes the same steps on a CPU, with a tiny shape.
. "$(dirname "$0")/setup.sh"
: "${STEPS:=tests times kernels long}"
SHAPE="--config llama-3.1-8b --token-budget 1024" GRAPH=--cuda-graph TESTS="-k cuda"
LENGTHS=32768,131072 LONGEST=131072 LONG=524288
if [ "$1" = --rehearse ]; then
    SHAPE="--config tiny --token-budget 96 --device cpu --new-tokens 4" GRAPH=
    TESTS=tests/test_imports.py LENGTHS=200,400 LONGEST=400 LONG=800
fi
mkdir -p "$RESULTS"
measure() {  # its rows have their name when all are there
    ask gpu_$step.part speed $SHAPE $GRAPH "$@" &&
        mv "$RESULTS/gpu_$step.part.jsonl" "$RESULTS/gpu_$step.jsonl"
}

for step in $STEPS; do
    if [ -s "$RESULTS/gpu_$step.jsonl" ]; then echo "$step: there"; continue; fi
    echo "$step: $(date +%T)"
    case $step in
    tests)
        "$PYTHON" -m pytest -q $TESTS > "$RESULTS/gpu_tests.txt" 2>&1 && passed=yes || passed=no
        tail -5 "$RESULTS/gpu_tests.txt"; [ $passed = yes ] ;;
    times) measure --compile --lengths $LENGTHS --methods full --repeats 3 ;;
    kernels) measure --lengths $LONGEST --repeats 1 --operators ;;
    long) measure --lengths $LONG --methods sentencekv --repeats 1 ;;
    esac || echo "$step: failed"
done
echo "end: $(date +%T)"
