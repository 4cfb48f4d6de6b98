# How good and how fast the sentences are. A minute.
. "$(dirname "$0")/setup.sh"
ask segmentation segmentation "$@"
