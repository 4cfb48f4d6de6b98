# One layer of SentenceKV, up to a million tokens.
. "$(dirname "$0")/setup.sh"
ask scale_cpu scale --dtype bfloat16 "$@"
