# Everything needs Go; the tests also install their peers with apt where they are missing (test/peers.sh).
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:

export DROVER_BIN := $(CURDIR)/bin/drover

# How long the long runs are.
FUZZ_TIME   ?= 5m
KILL_ROUNDS ?= 50
FIO_SECONDS ?= 300

# All packages but those that run other programs for long, which have rungs of their own.
UNIT      = $$(go list ./... | grep -vE '/test/(interop|nbd|kill)$$')
# The packages with model tests: those whose tests link rapid, which alone know its flags.
MODELS    = $$(go list -test -f '{{.ImportPath}} {{join .Deps " "}}' ./... | sed -n 's|^\([^ ]*\)\.test .*pgregory.net/rapid.*|\1|p')

.PHONY: help build test test-long demo bench fuzz-long peers format vet staticcheck cross unit race fuzz model \
	interop fio kill clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

build: ## bin/drover, one static binary
	CGO_ENABLED=0 go build -trimpath -o bin/drover ./cmd/drover

test: peers format vet staticcheck unit race cross fuzz model interop kill fio ## everything that CI runs

test-long: FUZZ_TIME := 1m
test-long: peers build unit ## the slow rungs: kill 50 rounds, fio 5 minutes, a minute for each fuzz target
	go test -count=1 -timeout 60m $(MODELS) -rapid.checks=3000
	KILL_ROUNDS=$(KILL_ROUNDS) go test -count=1 -timeout 60m -v ./test/kill
	FIO_SECONDS=$(FIO_SECONDS) go test -count=1 -timeout 30m -v -run Fio ./test/nbd
	test/fuzz.sh $(FUZZ_TIME)

demo: peers build ## one file system through drover, judged by stock tools
	go run ./test/demo -drover bin/drover

bench: peers build ## drover and its peers under the same load; writes out/bench.md and out/bench.json
	mkdir -p out
	go run ./test/bench -drover bin/drover -markdown out/bench.md -json out/bench.json $(BENCH_FLAGS)

fuzz-long: ## every fuzz target for FUZZ_TIME (5m)
	test/fuzz.sh $(FUZZ_TIME)

peers: ## install what the tests compare with, where it is missing
	test/peers.sh || { [ "$${CI:-}" != true ] && echo "going on; the comparisons with what is missing are skipped"; }

format:
	@bad=$$(gofmt -l $$(find . -name '*.go' -not -path './.git/*')); \
	if [ -n "$$bad" ]; then echo "not formatted by gofmt:"; echo "$$bad"; exit 1; fi

vet:
	go vet ./...

# Pinned in tools/go.mod, apart from the product's own dependencies.
bin/staticcheck: tools/go.mod tools/go.sum
	cd tools && go build -o ../bin/staticcheck honnef.co/go/tools/cmd/staticcheck

staticcheck: bin/staticcheck
	bin/staticcheck ./...

cross:
	test/cross.sh

# CI runs every test anew: a cached "ok" shows nothing.
unit: build
	go test -count=1 -timeout 10m $(UNIT)

race:
	go test -count=1 -timeout 10m -race -short $(UNIT)

fuzz:
	test/fuzz.sh 5s

model:
	go test -count=1 -timeout 10m $(MODELS) -rapid.checks=300

interop: build
	go test -count=1 -timeout 10m ./test/interop

fio: build
	go test -count=1 -timeout 10m ./test/nbd

kill: build
	go test -count=1 -timeout 10m ./test/kill

clean: ## remove what was built
	rm -rf bin out
