#!/usr/bin/env bash
# Runs every fuzz target of the module for a while each: test/fuzz.sh DURATION (as go test -fuzztime takes it).
set -euo pipefail
cd "$(dirname "$0")/.."
duration=${1:?usage: test/fuzz.sh DURATION, for example 5s}

targets=0
failed=()
while IFS= read -r package; do
  # -list prints the names, then a line "ok ...": only the names begin with Fuzz.
  names=$(go test -list '^Fuzz' "$package")
  for name in $(grep '^Fuzz' <<<"$names" || true); do
    targets=$((targets + 1))
    echo "--- fuzz $package $name"
    go test -run '^$' -fuzz "^$name\$" -fuzztime "$duration" "$package" || failed+=("$package $name")
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
echo "$targets fuzz targets ran for $duration each"
