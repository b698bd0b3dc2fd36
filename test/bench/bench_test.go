package main

import (
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/droverproject/drover/storage"
)

func TestRatiosArePairedByRound(t *testing.T) {
	r := result{Case: "c", Servers: []string{"a", "b"}, Base: "b", Samples: []sample{
		{Contender: "a", Round: 0, OpsPerSecond: 10}, {Contender: "b", Round: 0, OpsPerSecond: 5},
		{Contender: "b", Round: 1, OpsPerSecond: 100}, {Contender: "a", Round: 1, OpsPerSecond: 300},
		{Contender: "a", Round: 2, OpsPerSecond: 8}, {Contender: "b", Round: 2, OpsPerSecond: 8},
	}}
	cfg := config{contenders: []contender{{name: "a"}, {name: "b"}}, rounds: 3, seconds: 1, sizeMiB: 64}
	report := markdownReport(cfg, []result{r}, "a machine")
	if want := "| c | a | 10.0 | 2.00 (1.00 to 3.00) |"; !strings.Contains(report, want) {
		t.Errorf("the report lacks %q:\n%s", want, report)
	}
	if want := "| c | b | 8.00 | 1 |"; !strings.Contains(report, want) {
		t.Errorf("the report lacks %q:\n%s", want, report)
	}
}

func TestParseFio(t *testing.T) {
	out := `fio: connected to NBD server
{"jobs": [{"error": 0, "read": {"total_ios": 300, "runtime": 1500}, "write": {"total_ios": 0, "runtime": 0}}]}`
	r, err := parseFio([]byte(out))
	if err != nil || r.ops != 300 || r.seconds != 1.5 {
		t.Errorf("got %+v, %v", r, err)
	}
	for _, bad := range []string{"", "{}", `{"jobs": [{"error": 5}]}`, `{"jobs": [{"error": 0}]}`} {
		if _, err := parseFio([]byte(bad)); err == nil {
			t.Errorf("%q is no report", bad)
		}
	}
}

func TestEveryCaseHasItsOwnName(t *testing.T) {
	seen := make(map[string]bool)
	for _, w := range workloads() {
		if seen[w.Name] {
			t.Errorf("two cases are called %s", w.Name)
		}
		seen[w.Name] = true
	}
	if _, err := selectCases("no such case"); err == nil {
		t.Error("an expression that selects nothing must be an error")
	}
	if _, _, err := selectContenders("drover,nobody", "drover", false); err == nil {
		t.Error("an unknown contender must be an error")
	}
}

// measuredOf is a case in which a, the server that is judged, and b, the base, were measured once.
func measuredOf(ops, cpu float64) []result {
	return []result{{Case: "c", Servers: []string{"a", "b"}, Base: "b", Samples: []sample{
		{Contender: "a", OpsPerSecond: ops, CPUMicrosPerOp: cpu}, {Contender: "b", OpsPerSecond: 100, CPUMicrosPerOp: 10},
	}}}
}

func TestFloors(t *testing.T) {
	f := floors{Cases: newFloors(measuredOf(260, 5))}
	if f.Cases["c"] != (floor{Ops: 2, CPU: 0.65}) {
		t.Errorf("floors %+v", f)
	}
	for _, c := range []struct {
		ops, cpu float64
		want     string // empty: nothing is wrong
	}{
		{260, 5, ""},
		{200, 6.5, ""},
		{190, 5, "c: operations per second are 1.90 of those of b, and the floor is 2.00"},
		{260, 7, "c: processor time per operation is 0.70 of that of b, and the floor is 0.65"},
		{190, 7, "operations per second are 1.90 of those of b, and the floor is 2.00\nc: processor time"},
	} {
		err := f.broken(measuredOf(c.ops, c.cpu))
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v", c, err)
		}
	}
	// Who is the base itself, or was measured without it, has no floor.
	alone := result{Case: "alone", Servers: []string{"a"}, Base: "b", Samples: []sample{{Contender: "a", OpsPerSecond: 1}}}
	self := result{Case: "self", Servers: []string{"b"}, Base: "b", Samples: []sample{{Contender: "b", OpsPerSecond: 1}}}
	if got := newFloors([]result{alone, self, {Case: "nothing"}}); len(got) != 0 {
		t.Errorf("floors without a base: %+v", got)
	}
}

func TestFloorsCountWhereTheyWereRecorded(t *testing.T) {
	name := filepath.Join(t.TempDir(), "floors.json")
	here := condition{Processors: 2, Peer: "qemu-nbd 7.2", Base: "b"}
	check := func(where condition, ops float64) (string, error) {
		var said strings.Builder
		err := checkFloors(&said, name, where, measuredOf(ops, 5))
		return said.String(), err
	}
	if said, err := check(here, 1); err != nil || !strings.Contains(said, "has none") {
		t.Errorf("without a file: %q, %v", said, err)
	}
	if err := recordFloors(name, here, measuredOf(260, 5)); err != nil {
		t.Fatal(err)
	}
	if said, err := check(here, 260); err != nil || said != "" {
		t.Errorf("what was recorded: %q, %v", said, err)
	}
	if said, err := check(here, 100); err == nil || said != "" || !strings.Contains(err.Error(), "the floor is 2.00") {
		t.Errorf("a figure below its floor: %q, %v", said, err)
	}
	for _, other := range []condition{{4, here.Peer, here.Base}, {2, "qemu-nbd 9.0", here.Base}, {2, here.Peer, "nbdkit-raw"}} {
		said, err := check(other, 100)
		if err != nil || strings.Count(said, "\n") != 1 || !strings.Contains(said, "Not compared") {
			t.Errorf("%v: %q, %v", other, said, err)
		}
	}
}

func TestRecordingSomeCasesKeepsTheOthers(t *testing.T) {
	name := filepath.Join(t.TempDir(), "floors.json")
	here := condition{Processors: 2, Peer: "qemu-nbd 7.2", Base: "b"}
	other := measuredOf(130, 10)
	other[0].Case = "other"
	for _, results := range [][]result{measuredOf(260, 5), other} {
		if err := recordFloors(name, here, results); err != nil {
			t.Fatal(err)
		}
	}
	f, err := readFloors(name)
	want := floors{here, map[string]floor{"c": {2, 0.65}, "other": {1, 1.3}}}
	if diff := cmp.Diff(want, f, cmp.AllowUnexported(floors{})); err != nil || diff != "" {
		t.Errorf("%v\n%s", err, diff)
	}
	// Ratios of another machine are no company for these.
	elsewhere := condition{Processors: 8, Peer: here.Peer, Base: "b"}
	if err := recordFloors(name, elsewhere, other); err != nil {
		t.Fatal(err)
	}
	if f, err = readFloors(name); err != nil || f.condition != elsewhere || len(f.Cases) != 1 {
		t.Errorf("recorded elsewhere: %+v, %v", f, err)
	}
	if err := os.WriteFile(name, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := checkFloors(io.Discard, name, here, other); err == nil {
		t.Error("floors that cannot be read must not pass")
	}
}

func TestWhoTakesPart(t *testing.T) {
	all, missing, err := selectContenders(defaultContenders, "no-such-drover", true)
	if err != nil || len(all)+len(missing) != 5 {
		t.Fatalf("%v, %v, %v", all, missing, err)
	}
	if all[0].name != "drover" || all[len(all)-1].name != "qemu-nbd-uring" {
		t.Errorf("the first and the last stay, installed or not: %v", all)
	}
	cfg := config{contenders: allContenders("drover"), rounds: 1, seconds: 1, sizeMiB: 64}
	for _, w := range workloads() {
		entries, base := w.takePart(cfg)
		names := make(map[string]bool)
		for _, e := range entries {
			if names[e.name] {
				t.Errorf("%s: %s takes part twice", w.Name, e.name)
			}
			names[e.name] = true
		}
		if raw := w.Disk == diskFull || w.Disk == diskFresh || w.Disk == diskScattered || w.Disk == diskEmpty || w.Disk == diskCold; w.entries == nil && names["file"] != raw {
			t.Errorf("%s: the raw file takes part: %v", w.Name, names["file"])
		}
		if w.entries == nil && (!names["drover"] || base != cfg.contenders[len(cfg.contenders)-1].name) {
			t.Errorf("%s: %v, base %s", w.Name, names, base)
		}
	}
}

func TestCaseThatFailsLeavesTheOthers(t *testing.T) {
	var order []string
	entries := func(failing string) func(config, workload) ([]entry, string) {
		one := func(name string) entry {
			return entry{name: name, run: func(context.Context) (sample, error) {
				order = append(order, name)
				if name == failing {
					return sample{}, errors.New("out of order")
				}
				return sample{OpsPerSecond: 5}, nil
			}}
		}
		return func(config, workload) ([]entry, string) { return []entry{one("a"), one("b")}, "b" }
	}
	nobody := func(config, workload) ([]entry, string) { return nil, "b" }
	cfg := config{rounds: 2, cases: []workload{
		{Name: "bad", entries: entries("b")}, {Name: "none", entries: nobody}, {Name: "good", entries: entries("")},
	}}
	results, err := measure(t.Context(), cfg)
	if err == nil || !strings.Contains(err.Error(), "bad: b: out of order") {
		t.Errorf("error %v", err)
	}
	if len(results) != 1 || results[0].Case != "good" || len(results[0].Samples) != 4 {
		t.Fatalf("results %+v", results)
	}
	// Who begins changes from round to round.
	if diff := cmp.Diff([]string{"a", "b", "a", "b", "b", "a"}, order); diff != "" {
		t.Error(diff)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if results, err := measure(ctx, cfg); len(results) != 0 || !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted: %+v, %v", results, err)
	}
}

func TestForecast(t *testing.T) {
	cases, err := selectCases("^4k-randread-qd1-x1$|^luks-4k-randread")
	if err != nil {
		t.Fatal(err)
	}
	cfg := config{contenders: allContenders("drover"), cases: cases, rounds: 10, seconds: 2}
	// Six contenders on a plain disk, the four with QCOW2 on an encrypted one.
	if got := cfg.forecast(); !strings.HasPrefix(got, "2 cases in 10 rounds: 100 runs of 2 s, about 6 minutes") {
		t.Error(got)
	}
}

func TestCasesThatReadShareImages(t *testing.T) {
	s := make(shelf)
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if s.has(image, diskFull) {
		t.Error("an image that nobody has made is on the shelf")
	}
	s.add(image, diskFull)
	if !s.has(image, diskFull) || s.has(image, diskZlib) {
		t.Error("an image is for its own kind of disk")
	}
	s.spoil(image)
	if s.has(image, diskFull) {
		t.Error("an image that was written to is not as it was prepared")
	}
	s.clear()
	if _, err := os.Stat(image); !os.IsNotExist(err) || len(s) != 0 {
		t.Errorf("after all: %v, %v", err, s)
	}
	for _, w := range workloads() {
		if w.writes() != strings.Contains(w.Name, "write") {
			t.Errorf("%s writes: %v", w.Name, w.writes())
		}
	}
}

func TestCommandLinesOfEncryptedDisks(t *testing.T) {
	s := serving{image: "i", socket: "s", secret: "k"}
	for _, c := range allContenders("drover") {
		if !diskLUKS.suits(c) {
			continue
		}
		line := strings.Join(c.args(s), " ")
		for _, want := range []string{"--object secret,id=key,file=k", "encrypt.key-secret=key", "file.filename=i"} {
			if !strings.Contains(line, want) {
				t.Errorf("%s: %q lacks %q", c.name, line, want)
			}
		}
	}
}

func TestParseStrace(t *testing.T) {
	table := `% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 60.00    0.000600           1       600        12 read
 40.00    0.000400           2       200           fdatasync
------ ----------- ----------- --------- --------- ----------------
100.00    0.001000           1       800        12 total
`
	calls := parseStrace(table)
	if diff := cmp.Diff(map[string]int{"read": 600, "fdatasync": 200}, calls); diff != "" {
		t.Fatal(diff)
	}
	report := syscallReport([]counted{{Case: "c", Server: "s", Ops: 400, Flushes: 100, Calls: calls}})
	for _, want := range []string{"| c | s | 2.00 | read 1.50, fdatasync 0.50 |", "| c | s | 100 | 200 | 2.00 |"} {
		if !strings.Contains(report, want) {
			t.Errorf("the report lacks %q:\n%s", want, report)
		}
	}
	if len(parseStrace("strace: attach: Operation not permitted\n")) != 0 {
		t.Error("what is no table has no counts")
	}
}

func TestCasesBesideEachOther(t *testing.T) {
	known := make(map[string]bool)
	for _, w := range workloads() {
		known[w.Name] = true
	}
	for _, pair := range comparisons {
		if !known[pair[0]] || !known[pair[1]] {
			t.Errorf("%v are not both cases", pair)
		}
	}
	results := []result{
		{Case: comparisons[0][0], Servers: []string{"a"}, Samples: []sample{{Contender: "a", OpsPerSecond: 100, CPUMicrosPerOp: 8}}},
		{Case: comparisons[0][1], Servers: []string{"a"}, Samples: []sample{{Contender: "a", OpsPerSecond: 50, CPUMicrosPerOp: 12}}},
	}
	var b strings.Builder
	writeComparisons(&b, results)
	if want := comparisons[0][1] + " | " + comparisons[0][0] + " | a | 0.50 | 1.50 |"; !strings.Contains(b.String(), want) {
		t.Errorf("%q lacks %q", b.String(), want)
	}
}

// TestYardsticks runs what is measured without a server, shortly, in this process.
func TestYardsticks(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("processor time is read on Linux only")
	}
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Skip("qemu-img is not installed")
	}
	cfg := config{dir: t.TempDir(), sizeMiB: 16}
	packed := contender{name: "packed", format: "qcow2"}
	full := contender{name: "full", format: "qcow2"}
	for c, d := range map[string]disk{packed.image(cfg.dir): diskZlib, full.image(cfg.dir): diskFull} {
		if err := d.prepare(t.Context(), cfg, contender{name: strings.TrimSuffix(filepath.Base(c), ".qcow2"), format: "qcow2"}); err != nil {
			t.Fatal(err)
		}
	}
	clusters, err := compressedClusters(packed.image(cfg.dir))
	if err != nil || len(clusters) != cfg.sizeMiB<<20/zlibCluster {
		t.Fatalf("%d clusters, %v", len(clusters), err)
	}
	for _, what := range []string{"library:" + full.image(cfg.dir), "pread:" + filepath.Join(cfg.dir, "pattern.raw"), "inflate:" + packed.image(cfg.dir)} {
		var out strings.Builder
		if err := measureInside(t.Context(), &out, what, 0.01); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		var r insideReport
		if err := json.Unmarshal([]byte(out.String()), &r); err != nil || r.Ops == 0 || r.Seconds <= 0 || r.CPU <= 0 {
			t.Errorf("%s: %s, %v", what, out.String(), err)
		}
	}
	for _, bad := range []string{"", "tea:x", "inflate:" + full.image(cfg.dir), "inflate:" + filepath.Join(cfg.dir, "pattern.raw"), "pread:/nowhere"} {
		if err := measureInside(t.Context(), io.Discard, bad, 0.01); err == nil {
			t.Errorf("%q must be an error", bad)
		}
	}
}

// counting is a file of which writes and syncs are counted.
type counting struct {
	storage.File
	writes, syncs atomic.Int64
}

func (c *counting) WriteAt(p []byte, off int64) (int, error) {
	c.writes.Add(1)
	return c.File.WriteAt(p, off)
}

func (c *counting) Sync() error { c.syncs.Add(1); return nil }

func TestEveryThirtySecondWriteIsFlushed(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("processor time is read on Linux only")
	}
	f := &counting{File: storage.NewMemFile("disk")}
	w := workload{Depth: 16, Fsync: 32, Ops: 1000, Size: 1 << 20}
	ran, err := writeAndFlush(t.Context(), config{}, f, w)
	if err != nil || ran.ops != 1000 || ran.flushes != 31 {
		t.Fatalf("%+v, %v", ran, err)
	}
	if f.writes.Load() != 1000 || f.syncs.Load() != 31 {
		t.Errorf("%d writes, %d syncs", f.writes.Load(), f.syncs.Load())
	}
	w.Ops = 0
	if ran, err = writeAndFlush(t.Context(), config{seconds: 0.01}, f, w); err != nil || ran.ops == 0 || ran.seconds < 0.01 {
		t.Errorf("by time: %+v, %v", ran, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := writeAndFlush(ctx, config{seconds: 1}, f, w); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestPicture(t *testing.T) {
	s := series{title: "<t>", axis: "x", values: []int64{1, 1024, 2 << 20}, label: bytesLabel}
	picture := s.draw([]line{
		{"a", [][]float64{{9000}, {2000, 2500, 2700}, {54321}}, [][]float64{{1}, {2}, {3}}},
		{"b", [][]float64{{10000}, {20000}, {30000}}, [][]float64{{9}, {8}, {0}}},
	}, "three rounds")
	for _, want := range []string{"</svg>", ">1 KiB<", ">2 MiB<", ">50k<", "polyline", "&lt;t&gt;, by x", ">three rounds<",
		">operations per second<", ">server CPU per operation, µs<", ">a<", ">b<", "prefers-color-scheme: dark"} {
		if !strings.Contains(picture, want) {
			t.Errorf("the picture lacks %q:\n%s", want, picture)
		}
	}
	if err := xml.Unmarshal([]byte(picture), new(struct{})); err != nil {
		t.Errorf("the picture is no XML: %v", err)
	}
}

func TestScales(t *testing.T) {
	linear := scaleOf([][][]float64{{{1, 2}, {5}}, {{0}}})
	if linear.log || linear.part(0) != 0 || linear.part(linear.most) != 1 || linear.most < 5 {
		t.Errorf("%+v", linear)
	}
	// What is small beside the largest is seen all the same.
	wide := scaleOf([][][]float64{{{8}, {9}}, {{20}, {2800}}})
	if diff := cmp.Diff([]float64{1, 10, 100, 1000, 10000}, wide.lines); !wide.log || diff != "" {
		t.Errorf("%+v\n%s", wide, diff)
	}
	if got := wide.part(100); math.Abs(got-0.5) > 1e-9 {
		t.Errorf("100 is %g of the way up", got)
	}
	if one := scaleOf([][][]float64{{{0}}}); math.IsNaN(one.part(0)) {
		t.Errorf("nothing but 0: %+v", one)
	}
}

func TestSeriesGoAsFarAsPromised(t *testing.T) {
	last := map[string]int64{"depth": 64, "connections": 8, "size": 2 << 50, "snapshots": 1000, "chain": 50, "exports": 1000}
	for _, s := range allSeries() {
		if got := s.values[len(s.values)-1]; got != last[s.name] {
			t.Errorf("%s ends at %d, want %d", s.name, got, last[s.name])
		}
		delete(last, s.name)
	}
	if len(last) > 0 {
		t.Errorf("there is no series of %v", last)
	}
}

func TestRoundKeepsSmallRatios(t *testing.T) {
	for _, c := range [][2]float64{{1.234, 1.23}, {284.944, 284.94}, {0.123, 0.12}, {0.00317, 0.0032}, {0.0999, 0.1}, {0, 0}} {
		if got := round(c[0]); math.Abs(got-c[1]) > 1e-9 {
			t.Errorf("round(%v) = %v, want %v", c[0], got, c[1])
		}
	}
}
