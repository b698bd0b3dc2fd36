#!/usr/bin/env bash
# Runs every fuzz target of the module for a while each: test/fuzz.sh LIMIT, a duration (5m) or a number of inputs (20000x).
set -euo pipefail
cd "$(dirname "$0")/.."
limit=${1:?usage: test/fuzz.sh LIMIT, for example 5m or 20000x}

log=$(mktemp)
trap 'rm -f "$log"' EXIT
targets=0
failed=()
while IFS= read -r package; do
  # -list prints the names, then a line "ok ...": only the names begin with Fuzz.
  names=$(go test -list '^Fuzz' "$package")
  for name in $(grep '^Fuzz' <<<"$names" || true); do
    targets=$((targets + 1))
    echo "--- fuzz $package $name"
    # Minimising an interesting input may take a minute by default, in which nothing else is tried.
    go test -run '^$' -fuzz "^$name\$" -fuzztime "$limit" -fuzzminimizetime 10x "$package" 2>&1 | tee "$log" && continue
    # Go's fuzzer may report the end of its own time as a failure, without an input that fails (golang issue 48591).
    if grep -q 'context deadline exceeded' "$log" && ! grep -qE 'Failing input|panic:' "$log"; then
      echo "    (its time was over; no input failed)"
      continue
    fi
    failed+=("$package $name")
  done
done < <(grep -rl --include='*_test.go' '^func Fuzz' . | xargs -r -n1 dirname | sort -u)

if [ "$targets" -eq 0 ]; then
  echo "test/fuzz.sh: found no fuzz target" >&2
  exit 1
fi
if [ ${#failed[@]} -gt 0 ]; then
  printf 'test/fuzz.sh: FAILED %s\n' "${failed[@]}" >&2
  exit 1
fi
echo "$targets fuzz targets ran for $limit each"
