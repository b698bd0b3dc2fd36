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
SOAK_TIME   ?= 10m
RACE_TIME   ?= 30m
CRASH_SEEDS ?= 200
# Which defects `make mutation` tries: a regular expression of their names.
MUTATION    ?= .
# Those that make test tries: one of each way to lose data, each caught within seconds.
MUTATION_CI = ^(skip-first-sync|no-copy-on-write|evict-dirty)$$

# All packages but those that have rungs of their own: they run long, or run other programs.
UNIT      = $$(go list ./... | grep -vE '/test/(interop|qemunbd|scripts|hostile|weakness|coverage|nbd|kill|crash|fault|race|soak|vm)$$')
# The packages with model tests drawn by rapid, which alone know its flags.
MODELS    = ./block ./qcow2/internal/bitmap ./qcow2/internal/format ./test/model

.PHONY: help build install install-links test test-long demo bench bench-record bench-starts bench-syscalls bench-plots bench-all bench-commands fuzz-long peers format vet staticcheck cross unit race race-long fuzz model \
	test-vm vm-short bench-vm interop hostile weakness coverage coverage-table crash crash-long fault fio kill soak soak-short mutation mutation-ci clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

build: ## bin/drover, one static binary
	CGO_ENABLED=0 go build -trimpath -o bin/drover ./cmd/drover

# Where things are installed. DESTDIR is put before all of them.
PREFIX  ?= /usr/local
BINDIR  ?= $(PREFIX)/bin
MANDIR  ?= $(PREFIX)/share/man
UNITDIR ?= $(PREFIX)/lib/systemd/system
DBUSDIR ?= $(PREFIX)/share/dbus-1

install: ## the program, its manual pages and completions, and what dist/ has for systemd and D-Bus
	@test -x bin/drover || { echo "there is no bin/drover: make build"; exit 1; }
	install -D -m 755 bin/drover '$(DESTDIR)$(BINDIR)/drover'
	install -d '$(DESTDIR)$(MANDIR)/man1' '$(DESTDIR)$(PREFIX)/share/bash-completion/completions' \
	  '$(DESTDIR)$(PREFIX)/share/zsh/site-functions' '$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d'
	bin/drover man '$(DESTDIR)$(MANDIR)/man1'
	bin/drover completion bash > '$(DESTDIR)$(PREFIX)/share/bash-completion/completions/drover'
	bin/drover completion zsh > '$(DESTDIR)$(PREFIX)/share/zsh/site-functions/_drover'
	bin/drover completion fish > '$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/drover.fish'
	install -d '$(DESTDIR)$(UNITDIR)'
	for unit in dist/drover*.service; do sed 's|/usr/bin/drover|$(BINDIR)/drover|' $$unit > '$(DESTDIR)$(UNITDIR)'/$${unit#dist/}; done
	install -D -m 644 dist/org.kernel.TCMUService1.service '$(DESTDIR)$(DBUSDIR)/system-services/org.kernel.TCMUService1.service'
	install -D -m 644 dist/org.kernel.TCMUService1.conf '$(DESTDIR)$(DBUSDIR)/system.d/org.kernel.TCMUService1.conf'

install-links: ## qemu-img, qemu-io and qemu-nbd as other names of drover, where it is installed
	for name in qemu-img qemu-io qemu-nbd; do ln -sf drover '$(DESTDIR)$(BINDIR)'/$$name; done

# Each rung says how long it took: CI is to stay below 25 minutes.
RUNGS = peers format vet staticcheck unit race cross fuzz model interop hostile weakness coverage crash fault kill fio vm-short soak-short mutation-ci

test: ## everything that CI runs
	@for rung in $(RUNGS); do \
	  echo "=== $$rung"; began=$$SECONDS; \
	  $(MAKE) --no-print-directory $$rung || { echo "FAILED: make $$rung"; exit 1; }; \
	  echo "=== $$rung took $$((SECONDS - began)) s"; \
	done; \
	echo "=== all of: $(RUNGS): passed in $$SECONDS s"

test-long: FUZZ_TIME := 1m
test-long: peers build unit ## the slow rungs: kill 50 rounds, fio 5 minutes, a minute for each fuzz target
	go test -count=1 -timeout 60m $(MODELS) -rapid.checks=3000
	KILL_ROUNDS=$(KILL_ROUNDS) go test -count=1 -timeout 60m -v ./test/kill
	FIO_SECONDS=$(FIO_SECONDS) go test -count=1 -timeout 30m -v -run Fio ./test/nbd
	test/fuzz.sh $(FUZZ_TIME)

demo: peers build ## one file system through drover, judged by stock tools
	go run ./test/demo -drover bin/drover

# For `go run ./test/bench`: what is measured, and the name of the files under out/ that say what came of it.
BENCH = mkdir -p out && go run ./test/bench -drover bin/drover -markdown out/$(1).md -json out/$(1).json

bench: peers build ## drover and its peers under the same load; writes out/bench.md and .json, fails below test/bench/floors.json
	$(call BENCH,bench) $(BENCH_FLAGS)

bench-record: peers build ## the same, and notes the ratios reached in test/bench/floors.json
	$(call BENCH,bench) -record-floors $(BENCH_FLAGS)

bench-starts: peers build ## from exec to the first byte, and memory when idle; writes out/starts.md and .json
	$(call BENCH,starts) -starts $(BENCH_FLAGS)

bench-syscalls: build ## system calls of an operation, syncs of a flush; writes out/syscalls.md and .json
	PEERS=bench test/peers.sh
	$(call BENCH,syscalls) -syscalls $(BENCH_FLAGS)

# Where the pictures go.
PLOTS ?= docs/plots

bench-plots: peers build ## how cost grows; draws pictures into docs/plots, writes out/plots.md and .json
	$(call BENCH,plots) -plots $(PLOTS) $(BENCH_FLAGS)

# The comparison with the floors comes last: where it fails, everything has been measured.
bench-all: bench-starts bench-syscalls bench-plots bench ## all of these, for about an hour

bench-commands: peers build ## drover and qemu-img run the same commands on the same images; writes out/commands.md
	mkdir -p out
	go run ./test/bench/commands -drover bin/drover -markdown out/commands.md $(BENCH_FLAGS)

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

race: build ## the race detector: test/race on 1, 2 and 8 processors, and the shorter unit tests
	go test -count=1 -timeout 10m -race -short $(UNIT)
	go test -count=1 -timeout 10m -race -short -run 'TestEveryCallOfAKind|TestFullDisk|TestSnapshotsOnBrokenStorage' ./test/fault
	go test -count=1 -timeout 10m -race -short -cpu 1,2,8 ./test/race

race-long: ## test/race explores for RACE_TIME (30m) under the race detector
	DROVER_LONG=$(RACE_TIME) go test -count=1 -timeout 0 -race -v -cpu 1,2,8 ./test/race

fuzz:
	test/fuzz.sh 2000x

model:
	go test -count=1 -timeout 10m $(MODELS) -rapid.checks=300
	go test -count=1 -timeout 10m -run 'TestDeviceContract|TestRandomDamage' ./qcow2 ./qcow2/internal/check -rapid.checks=300

interop: build
	go test -count=1 -timeout 10m ./test/interop ./test/qemunbd ./test/scripts

hostile: build ## damaged images: what stock makes of each, and what drover does
	go test -count=1 -timeout 10m ./test/hostile

coverage: build ## docs/coverage.md is true as far as names go, and the tests that stand nowhere else
	go test -count=1 -timeout 10m ./test/coverage

coverage-table: build ## run every test that docs/coverage.md names, and write it anew
	go run ./test/coverage

weakness: build ## what stock QEMU does badly to an image, done better
	go test -count=1 -timeout 10m -v ./test/weakness

fio: build
	go test -count=1 -timeout 10m ./test/nbd

kill: build
	go test -count=1 -timeout 10m ./test/kill

crash: ## over 120,000 states that a power cut may leave
	go test -count=1 -timeout 10m -v ./test/crash -seeds 1 -min-states 120000

crash-long: ## millions of them, CRASH_SEEDS (200) workloads on each image
	go test -count=1 -timeout 0 -v ./test/crash -seeds $(CRASH_SEEDS) -samples 48 -min-states 2000000

fault: ## every storage call of the workloads fails once, in every way
	go test -count=1 -timeout 10m -v ./test/fault

soak: build ## server, clients and kills for SOAK_TIME (10m); SOAK_FLAGS='-seed N' repeats a run
	go test -count=1 -timeout 0 -v ./test/soak -duration $(SOAK_TIME) $(SOAK_FLAGS)

soak-short: build
	go test -count=1 -timeout 10m -v ./test/soak -duration 15s

test-vm: build ## drover tcmu beside the kernel's SCSI target, in a virtual machine; needs neither root nor KVM
	PEERS=vm test/peers.sh
	DROVER_VM=1 go test -count=1 -timeout 60m -v ./test/vm

vm-short: build ## what of test-vm takes three minutes
	@PEERS=vm test/peers.sh || { [ "$${CI:-}" != true ] && echo "going on; tests that lack something are skipped"; }
	DROVER_VM=short go test -count=1 -timeout 15m -v ./test/vm

bench-vm: build ## drover tcmu beside tcmu-runner and the kernel's file backstore in one boot; writes out/bench-vm.md
	PEERS=vm test/peers.sh
	go run ./test/vm/bench -drover bin/drover -markdown out/bench-vm.md $(BENCH_FLAGS)

mutation: ## break the engine in every known way and demand that a test notices; writes out/mutation.md
	mkdir -p out
	MUTATION_TABLE=$(CURDIR)/out/mutation.md go test -count=1 -tags mutation -timeout 90m -v ./test/mutation -only '$(MUTATION)'

# The rungs before it have run the suites without a defect.
mutation-ci:
	go test -count=1 -tags mutation -timeout 20m -v ./test/mutation -baseline=false -only '$(MUTATION_CI)'

clean: ## remove what was built
	rm -rf bin out
