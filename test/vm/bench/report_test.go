package main

import (
	"strings"
	"testing"
)

// TestTable reads what a guest printed and compares contenders within rounds.
func TestTable(t *testing.T) {
	console := "GUEST-UP 3\r\n" +
		"SAMPLE drover 1 randwrite-q32 0 50000000 0 0 0 40000 9000 1000\r\n" + // 10,000 operations in a second
		"SAMPLE drover 1 alloc-q32 0 50000000 0 0 0 20000 5000 1000\r\n" +
		"SAMPLE tcmu-runner 1 randwrite-q32 0 100000000 0 0 0 10000 2500 1000\r\n" +
		"SAMPLE fileio 1 read-1m-q8 0 0 204800 100 2000 0 0 0\r\n"
	samples, err := parseSamples(console)
	if err != nil || len(samples) != 4 {
		t.Fatalf("%v, %v", samples, err)
	}
	if s := samples[0]; s.perSecond != 10_000 || s.cpu != 5 {
		t.Errorf("%+v", s)
	}
	if s := samples[3]; s.perSecond != 100 {
		t.Errorf("%+v", s)
	}
	got := table(samples, []string{"drover", "tcmu-runner", "fileio"})
	for _, want := range []string{"| randwrite-q32 | 10000 | 2500 | – | 4.00 (4.00 to 4.00) | – | 5.0 | 40.0 |", "drover 0.50."} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	for _, bad := range []string{"SAMPLE drover 1 x 1 0 0 0 0 4 1 1", "SAMPLE drover 1 x 0 0 0 0 0 0 0 0", "SAMPLE drover x"} {
		if _, err := parseSamples(bad); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}
