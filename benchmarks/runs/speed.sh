# Times on a CPU, both dtypes, beside transformers and llama.cpp, where they are installed. 20 minutes
# on a machine that does nothing else.
. "$(dirname "$0")/setup.sh"
for dtype in bfloat16 float32; do
    ask speed_cpu_$dtype speed --data walden --lengths 1024,3900,7500 --token-budget 512 --compile \
        --compare transformers --compare llama.cpp --repeats 2 --dtype $dtype "$@"
done
