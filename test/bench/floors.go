package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
)

// floor is how much worse than the base a contender may be in one case before something is wrong.
type floor struct {
	Ops float64 `json:"least_op_ratio"` // of operations per second
	CPU float64 `json:"most_cpu_ratio"` // of processor time per operation
}

// floorRoom is the room that recorded floors leave below what was measured: other work on the machine must not fail them.
const floorRoom = 1.3

// floors maps cases to the floor of the first contender against the last.
type floors map[string]floor

func newFloors(cfg config, results []result) floors {
	f := make(floors)
	for _, res := range results {
		ops, cpu, ok := res.against(cfg)
		if ok {
			f[res.Case] = floor{round(ops / floorRoom), round(cpu * floorRoom)}
		}
	}
	return f
}

// against returns the median ratios of the first contender to the last; ok is false where one of them did not take part.
func (r result) against(cfg config) (ops, cpu float64, ok bool) {
	first, base := cfg.contenders[0].name, cfg.contenders[len(cfg.contenders)-1].name
	all := r.ratios(first, base, func(s sample) float64 { return s.OpsPerSecond })
	if first == base || len(all) == 0 {
		return 0, 0, false
	}
	return median(all), median(r.ratios(first, base, func(s sample) float64 { return s.CPUMicrosPerOp })), true
}

func round(v float64) float64 { return math.Round(v*100) / 100 }

// broken lists the cases that are worse than they may be.
func (f floors) broken(cfg config, results []result) error {
	var errs []error
	for _, res := range results {
		ops, cpu, ok := res.against(cfg)
		limit, known := f[res.Case]
		switch {
		case !ok || !known:
		case ops < limit.Ops:
			errs = append(errs, fmt.Errorf("%s: %.2f times the operations of the base, at least %.2f wanted", res.Case, ops, limit.Ops))
		case cpu > limit.CPU:
			errs = append(errs, fmt.Errorf("%s: %.2f times the processor time of the base, at most %.2f wanted", res.Case, cpu, limit.CPU))
		}
	}
	return errors.Join(errs...)
}

func recordFloors(name string, cfg config, results []result) error {
	data, err := json.MarshalIndent(newFloors(cfg, results), "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(name, append(data, '\n'), 0o644)
}

func checkFloors(name string, cfg config, results []result) error {
	data, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	var f floors
	if err := json.Unmarshal(data, &f); err != nil {
		return fmt.Errorf("reading %s: %w", name, err)
	}
	return f.broken(cfg, results)
}
