#!/bin/sh
# Stands before rustc in a build for fuzzing: the program and the targets are watched by libFuzzer, what they depend on is
# not, so that an input is kept for what it does here. These are the flags of cargo-fuzz, without its sanitizers: they need
# a nightly compiler and look for errors of unsafe code, of which the program has none.
case ${CARGO_PKG_NAME:-} in
keybrake | keybrake-fuzz)
  exec "$@" -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares
  ;;
*) exec "$@" ;;
esac
