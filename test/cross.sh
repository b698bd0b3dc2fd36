#!/usr/bin/env bash
# Compiles and vets everything, tests included, for every platform that drover promises to build on.
set -euo pipefail
cd "$(dirname "$0")/.."
for os in linux darwin windows; do
  for arch in amd64 arm64; do
    echo "--- $os/$arch"
    GOOS=$os GOARCH=$arch CGO_ENABLED=0 go build ./...
    GOOS=$os GOARCH=$arch CGO_ENABLED=0 go vet ./...
  done
done
