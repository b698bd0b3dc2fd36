package main

import (
	"strings"
	"testing"
)

func TestRatiosArePairedByRound(t *testing.T) {
	r := result{Case: "c", Samples: []sample{
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
	if _, err := selectContenders("drover,nobody", "drover"); err == nil {
		t.Error("an unknown contender must be an error")
	}
}

func TestFloors(t *testing.T) {
	cfg := config{contenders: []contender{{name: "a"}, {name: "b"}}}
	measured := func(ops, cpu float64) []result {
		return []result{{Case: "c", Samples: []sample{
			{Contender: "a", OpsPerSecond: ops, CPUMicrosPerOp: cpu}, {Contender: "b", OpsPerSecond: 100, CPUMicrosPerOp: 10},
		}}}
	}
	f := newFloors(cfg, measured(260, 5))
	if f["c"] != (floor{Ops: 2, CPU: 0.65}) {
		t.Errorf("floors %+v", f)
	}
	for _, c := range []struct {
		ops, cpu float64
		ok       bool
	}{{260, 5, true}, {200, 6.5, true}, {190, 5, false}, {260, 7, false}} {
		if err := f.broken(cfg, measured(c.ops, c.cpu)); (err == nil) != c.ok {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

func TestPicture(t *testing.T) {
	s := series{title: "<t>", axis: "x", values: []int64{1, 1024, 2 << 20}, label: bytesLabel}
	picture := s.draw([]line{{"a", []float64{1000, 2000, 54321}, []float64{1, 2, 3}}, {"b", []float64{10, 20, 30}, []float64{9, 8, 0}}})
	for _, want := range []string{"</svg>", ">1K<", ">2M<", ">50k<", "polyline"} {
		if !strings.Contains(picture, want) {
			t.Errorf("the picture lacks %q:\n%s", want, picture)
		}
	}
}
