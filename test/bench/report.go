package main

import (
	"fmt"
	"sort"
	"strings"
)

// markdownReport writes one table: for each case and contender the medians, and against the base (the last contender)
// the ratios of each round, as median and range.
func markdownReport(cfg config, results []result, machine string) string {
	var b strings.Builder
	base := cfg.contenders[len(cfg.contenders)-1].name
	fmt.Fprintf(&b, "Machine: %s.\n\n", machine)
	fmt.Fprintf(&b, "%d rounds of %g s for each case and server, alternating; disk of %d MiB in the page cache; unix socket.\n",
		cfg.rounds, cfg.seconds, cfg.sizeMiB)
	fmt.Fprintf(&b, "Medians over the rounds. Ratios are to %s in the same round: median (lowest to highest).\n\n", base)
	fmt.Fprintln(&b, "| case | server | op/s | op/s ratio | server CPU µs/op | CPU ratio | peak MiB | host KiB/op |")
	fmt.Fprintln(&b, "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
	for _, res := range results {
		for _, c := range cfg.contenders {
			speed := func(s sample) float64 { return s.OpsPerSecond }
			cost := func(s sample) float64 { return s.CPUMicrosPerOp }
			if len(res.values(c.name, speed)) == 0 {
				continue // it cannot serve such a disk
			}
			memory := func(s sample) float64 { return s.MemoryMiB }
			space := func(s sample) float64 { return s.HostKiBPerOp }
			fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s | %s | %s |\n", res.Case, c.name,
				figure(median(res.values(c.name, speed))), ratioText(res.ratios(c.name, base, speed), c.name == base),
				figure(median(res.values(c.name, cost))), ratioText(res.ratios(c.name, base, cost), c.name == base),
				figure(median(res.values(c.name, memory))), figure(median(res.values(c.name, space))))
		}
	}
	return b.String()
}

// values returns a figure of a contender, round by round.
func (r result) values(contender string, of func(sample) float64) []float64 {
	var v []float64
	for _, s := range r.Samples {
		if s.Contender == contender {
			v = append(v, of(s))
		}
	}
	return v
}

// ratios pairs a contender with the base, round by round. A round in which the base measured nothing has no ratio.
func (r result) ratios(contender, base string, of func(sample) float64) []float64 {
	below := make(map[int]float64)
	for _, s := range r.Samples {
		if s.Contender == base {
			below[s.Round] = of(s)
		}
	}
	var v []float64
	for _, s := range r.Samples {
		if d := below[s.Round]; s.Contender == contender && d > 0 {
			v = append(v, of(s)/d)
		}
	}
	return v
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	v = append([]float64{}, v...)
	sort.Float64s(v)
	if n := len(v); n%2 == 0 {
		return (v[n/2-1] + v[n/2]) / 2
	}
	return v[len(v)/2]
}

func ratioText(v []float64, isBase bool) string {
	if isBase {
		return "1"
	}
	if len(v) == 0 {
		return "–"
	}
	v = append([]float64{}, v...)
	sort.Float64s(v)
	return fmt.Sprintf("%.2f (%.2f to %.2f)", median(v), v[0], v[len(v)-1])
}

func figure(v float64) string {
	switch {
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	default:
		return fmt.Sprintf("%.2f", v)
	}
}
