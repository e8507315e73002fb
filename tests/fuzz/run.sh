#!/bin/sh
# Fuzzes the readers of requests with libFuzzer: `make fuzz`. Needs a Rust toolchain, which may be a stable one, and a C++
# compiler for libFuzzer itself.
#
#   FUZZ_TARGETS="form path head grant"   what to fuzz, one after the other
#   FUZZ_SECONDS=60                       for how long each
#   FUZZ_MERGE=1                          instead, adds to tests/data/fuzz the few finds that reach new code
#
# What is found stays in .cache/fuzz/TARGET. An input that breaks a property is kept there as crash-…, and told.
set -eu
cd "$(dirname "$0")/../.."

export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/fuzz"
RUSTC_WRAPPER=$PWD/tests/fuzz/rustc.sh cargo build --locked --release --manifest-path tests/fuzz/Cargo.toml

failed=
for target in ${FUZZ_TARGETS:-form path head grant}; do
  program=$CARGO_TARGET_DIR/release/$target
  seeds=tests/data/fuzz/$target
  found=.cache/fuzz/$target
  mkdir -p "$found/corpus"
  if [ -n "${FUZZ_MERGE:-}" ]; then
    # Without counters, so that how often a line runs makes no input worth keeping; the largest gain first.
    "$program" -set_cover_merge=1 -use_counters=0 -max_len=4000 "$seeds" "$found/corpus"
    continue
  fi
  printf '== %s, %s s\n' "$target" "${FUZZ_SECONDS:-60}"
  if ! "$program" -max_total_time="${FUZZ_SECONDS:-60}" -max_len=4000 -timeout=10 -dict=tests/fuzz/traps.dict \
    -artifact_prefix="$found/" -print_final_stats=1 "$found/corpus" "$seeds"; then
    failed="$failed $target"
    # The newest one.
    input=$(ls -t "$found"/*-* | head -n 1)
    printf '\n%s breaks a property. To reproduce:\n' "$input"
    printf '  %s %s\n' "$program" "$input"
    printf 'or, with nothing but cargo:\n'
    printf '  cp %s %s/ && cargo test --locked --test it fuzz::\n\n' "$input" "$seeds"
  fi
done
[ -z "$failed" ] || { printf 'failed:%s\n' "$failed"; exit 1; }
