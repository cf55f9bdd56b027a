#!/bin/sh
# Runs every fuzz target for SECONDS each: proto/fuzz/run.sh [SECONDS]. Ends with the first finding; the input that shows
# it is in proto/fuzz/artifacts.
set -eu
seconds="${1:-60}"
cd "$(dirname "$0")/.."

missing=""
cargo fuzz --version >/dev/null 2>&1 || missing="cargo-fuzz"
cargo +nightly --version >/dev/null 2>&1 || missing="${missing:+$missing and }the nightly toolchain"
if [ -n "$missing" ]; then
    echo "SKIP fuzz: missing $missing" >&2
    exit 0
fi

for target in decode input ops heads; do
    echo "== fuzz $target for $seconds s"
    cargo +nightly fuzz run "$target" -- -max_total_time="$seconds" -max_len=16384 -rss_limit_mb=1024 -timeout=10
done
