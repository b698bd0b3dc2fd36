package main

import (
	"fmt"
	"slices"
	"strings"
)

// sample is what one run measured.
type sample struct {
	who, what string
	round     int
	perSecond float64 // operations
	cpu       float64 // microseconds of the daemon for one operation
}

// parseSamples reads the lines that jobs/bench.sh prints.
func parseSamples(console string) ([]sample, error) {
	var samples []sample
	for line := range strings.Lines(console) {
		line = strings.TrimSpace(line)
		if !strings.HasPrefix(line, "SAMPLE ") {
			continue
		}
		var s sample
		var code int
		var spent float64 // nanoseconds
		var readKiB, readOps, readMS, writeKiB, writeOps, writeMS float64
		_, err := fmt.Sscan(strings.TrimPrefix(line, "SAMPLE "), &s.who, &s.round, &s.what, &code, &spent,
			&readKiB, &readOps, &readMS, &writeKiB, &writeOps, &writeMS)
		if err != nil || code != 0 {
			return nil, fmt.Errorf("%q: %v", line, err)
		}
		block := 4.0
		if strings.Contains(s.what, "1m") {
			block = 1024
		}
		count := (readKiB + writeKiB) / block
		if ms := readMS + writeMS; count == 0 || ms == 0 {
			return nil, fmt.Errorf("%q: nothing was done", line)
		} else {
			s.perSecond = count / ms * 1000
		}
		s.cpu = spent / 1000 / count
		samples = append(samples, s)
	}
	return samples, nil
}

// table shows the medians, and how the first contender compares with each other one, round by round.
func table(samples []sample, contenders []string) string {
	var cases []string
	for _, s := range samples {
		if !slices.Contains(cases, s.what) {
			cases = append(cases, s.what)
		}
	}
	first := contenders[0]
	var b strings.Builder
	b.WriteString("| case |")
	rule := "| --- |"
	for _, c := range contenders {
		fmt.Fprintf(&b, " %s op/s |", c)
		rule += " ---: |"
	}
	for _, c := range contenders[1:] {
		fmt.Fprintf(&b, " %s / %s |", first, c)
		rule += " ---: |"
	}
	for _, c := range contenders {
		if c != kernel {
			fmt.Fprintf(&b, " %s CPU µs/op |", c)
			rule += " ---: |"
		}
	}
	fmt.Fprintf(&b, "\n%s\n", rule)
	for _, w := range cases {
		fmt.Fprintf(&b, "| %s |", w)
		for _, c := range contenders {
			fmt.Fprintf(&b, " %s |", figure(values(samples, c, w, speed)))
		}
		for _, c := range contenders[1:] {
			fmt.Fprintf(&b, " %s |", ratio(samples, first, c, w))
		}
		for _, c := range contenders {
			if c != kernel {
				fmt.Fprintf(&b, " %s |", figure(values(samples, c, w, cost)))
			}
		}
		b.WriteString("\n")
	}
	b.WriteString("\nAllocating beside overwriting, 4 KiB random writes at depth 32:")
	for _, c := range contenders {
		var ratios []float64
		for _, s := range samples {
			for _, other := range samples {
				if s.who == c && other.who == c && s.round == other.round && s.what == "alloc-q32" && other.what == "randwrite-q32" {
					ratios = append(ratios, s.perSecond/other.perSecond)
				}
			}
		}
		if len(ratios) > 0 {
			fmt.Fprintf(&b, " %s %.2f;", c, median(ratios))
		}
	}
	return strings.TrimSuffix(b.String(), ";") + ".\n"
}

// kernel is the contender that has no process.
const kernel = "fileio"

func speed(s sample) float64 { return s.perSecond }
func cost(s sample) float64  { return s.cpu }

func values(samples []sample, who, what string, of func(sample) float64) []float64 {
	var v []float64
	for _, s := range samples {
		if s.who == who && s.what == what {
			v = append(v, of(s))
		}
	}
	return v
}

// ratio compares two contenders within each round: median (lowest to highest).
func ratio(samples []sample, a, b, what string) string {
	var v []float64
	for _, s := range samples {
		for _, other := range samples {
			if s.who == a && other.who == b && s.what == what && other.what == what && s.round == other.round {
				v = append(v, s.perSecond/other.perSecond)
			}
		}
	}
	if len(v) == 0 {
		return "–"
	}
	return fmt.Sprintf("%.2f (%.2f to %.2f)", median(v), slices.Min(v), slices.Max(v))
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	v = slices.Sorted(slices.Values(v))
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

func figure(v []float64) string {
	if len(v) == 0 {
		return "–"
	}
	if m := median(v); m >= 100 {
		return fmt.Sprintf("%.0f", m)
	}
	return fmt.Sprintf("%.1f", median(v))
}
