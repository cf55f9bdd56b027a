#!/bin/sh
# Runs every fuzz target for SECONDS each: proto/fuzz/run.sh [SECONDS] [core]. First the targets of the core, then, unless `core`
# is given, those of the two programs (loadtest/fuzz: both are built again with a sanitizer). It ends with the first finding, whose input is in the directory's artifacts.
set -eu
seconds="${1:-60}"
scope="${2:-all}"
cd "$(dirname "$0")/../.."

missing=""
cargo fuzz --version >/dev/null 2>&1 || missing="cargo-fuzz"
cargo +nightly --version >/dev/null 2>&1 || missing="${missing:+$missing and }the nightly toolchain"
if [ -n "$missing" ]; then
    echo "SKIP fuzz: missing $missing" >&2
    exit 0
fi

run() {
    echo "== fuzz $2 for $seconds s"
    (cd "$1" && cargo +nightly fuzz run "$2" -- -max_total_time="$seconds" -max_len=16384 -rss_limit_mb=1024 -timeout=10)
}
for target in decode input ops heads; do run proto "$target"; done
[ "$scope" = core ] && exit 0
for target in routing headers identity account configuration records proxy_header; do run loadtest "$target"; done
