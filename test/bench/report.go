package main

import (
	"fmt"
	"sort"
	"strings"
)

// markdownReport writes one table: for each case and server the medians, and against the case's base the ratios of each
// round, as median and range. Below it stands what only two cases together show.
func markdownReport(cfg config, results []result, machine string) string {
	var b strings.Builder
	base := cfg.contenders[len(cfg.contenders)-1].name
	fmt.Fprintf(&b, "Machine: %s.\n\n", machine)
	fmt.Fprintf(&b, "%d rounds of %g s for each case and server, alternating; disk of %d MiB in the page cache; unix socket.\n",
		cfg.rounds, cfg.seconds, cfg.sizeMiB)
	fmt.Fprintf(&b, "Medians over the rounds. Ratios are to the row with the ratio 1 (%s, where it takes part) in the same round: median\n", base)
	fmt.Fprintf(&b, "(lowest to highest). Processor time is the server's; \"file\" has no server, and its time is the load's own.\n\n")
	fmt.Fprintln(&b, "| case | server | op/s | op/s ratio | server CPU µs/op | CPU ratio | peak MiB | host KiB/op |")
	fmt.Fprintln(&b, "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
	for _, res := range results {
		for _, name := range res.Servers {
			fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s | %s | %s |\n", res.Case, name,
				figure(median(res.values(name, speed))), ratioText(res.ratios(name, res.Base, speed), name == res.Base),
				figure(median(res.values(name, cost))), ratioText(res.ratios(name, res.Base, cost), name == res.Base),
				known(median(res.values(name, memory))), figure(median(res.values(name, space))))
		}
	}
	writeComparisons(&b, results)
	return b.String()
}

func speed(s sample) float64  { return s.OpsPerSecond }
func cost(s sample) float64   { return s.CPUMicrosPerOp }
func memory(s sample) float64 { return s.MemoryMiB }
func space(s sample) float64  { return s.HostKiBPerOp }

// comparisons are the pairs of cases that say something together: what the second costs over the first.
var comparisons = [][2]string{
	{"small-4k-randwrite-qd16-x1", "2p-4k-randwrite-qd16-x1"},
	{"4k-randread-qd16-x1", "luks-4k-randread-qd16-x1"},
	{"4k-randwrite-qd16-x1", "luks-4k-randwrite-qd16-x1"},
	{"4k-randread-qd1-x1", "scattered-4k-randread-qd1-x1"},
	{"1m-read-qd8-x1", "empty-1m-read-qd8-x1"},
}

// writeComparisons writes a table of those pairs that were both measured. Their runs do not alternate, so only medians of all
// rounds are compared.
func writeComparisons(b *strings.Builder, results []result) {
	find := func(name string) *result {
		for i := range results {
			if results[i].Case == name {
				return &results[i]
			}
		}
		return nil
	}
	begun := false
	for _, pair := range comparisons {
		one, other := find(pair[0]), find(pair[1])
		if one == nil || other == nil {
			continue
		}
		for _, name := range other.Servers {
			before := median(one.values(name, cost))
			if before == 0 {
				continue
			}
			if !begun {
				fmt.Fprint(b, "\n| case | beside | server | op/s ratio | CPU ratio |\n| --- | --- | --- | ---: | ---: |\n")
				begun = true
			}
			fmt.Fprintf(b, "| %s | %s | %s | %.2f | %.2f |\n", pair[1], pair[0], name,
				median(other.values(name, speed))/median(one.values(name, speed)), median(other.values(name, cost))/before)
		}
	}
}

// known is figure for what a server may not have told.
func known(v float64) string {
	if v == 0 {
		return "–"
	}
	return figure(v)
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
