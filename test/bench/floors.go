package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
)

// floor is how much worse than the base the first server of a case may be before something is wrong.
type floor struct {
	Ops float64 `json:"least_op_ratio"` // of operations per second
	CPU float64 `json:"most_cpu_ratio"` // of processor time per operation
}

// floorRoom is the room that recorded floors leave below what was measured: other work on the machine must not fail them.
const floorRoom = 1.3

// condition is what ratios depend on beside the servers' own code. Floors count under the condition of their recording only.
type condition struct {
	Processors int    `json:"processors"`
	Peer       string `json:"peer"` // its version
	Base       string `json:"base"`
}

func (c condition) String() string {
	return fmt.Sprintf("%d processors, %s, against %s", c.Processors, c.Peer, c.Base)
}

// floors are the floors of cases, and where they count.
type floors struct {
	condition
	Cases map[string]floor `json:"cases"`
}

func newFloors(results []result) map[string]floor {
	f := make(map[string]floor)
	for _, res := range results {
		ops, cpu, ok := res.against()
		if ok {
			f[res.Case] = floor{round(ops / floorRoom), round(cpu * floorRoom)}
		}
	}
	return f
}

// against returns the median ratios of the first server to the base; ok is false where they are one, or the base did not
// take part.
func (r result) against() (ops, cpu float64, ok bool) {
	if len(r.Servers) == 0 || r.Servers[0] == r.Base {
		return 0, 0, false
	}
	all := r.ratios(r.Servers[0], r.Base, speed)
	if len(all) == 0 {
		return 0, 0, false
	}
	return median(all), median(r.ratios(r.Servers[0], r.Base, cost)), true
}

// round leaves two decimals, or two digits of what is smaller: a ratio of 0 would be a floor that nothing can keep.
func round(v float64) float64 {
	unit := 100.0
	for v > 0 && v*unit < 10 {
		unit *= 10
	}
	return math.Round(v*unit) / unit
}

// broken lists the figures that are worse than they may be.
func (f floors) broken(results []result) error {
	var errs []error
	for _, res := range results {
		ops, cpu, ok := res.against()
		limit, known := f.Cases[res.Case]
		if !ok || !known {
			continue
		}
		if ops < limit.Ops {
			errs = append(errs, fmt.Errorf("%s: operations per second are %.2f of those of %s, and the floor is %.2f",
				res.Case, ops, res.Base, limit.Ops))
		}
		if cpu > limit.CPU {
			errs = append(errs, fmt.Errorf("%s: processor time per operation is %.2f of that of %s, and the floor is %.2f",
				res.Case, cpu, res.Base, limit.CPU))
		}
	}
	return errors.Join(errs...)
}

// readFloors reads recorded floors; without a file there are none.
func readFloors(name string) (floors, error) {
	var f floors
	data, err := os.ReadFile(name)
	if errors.Is(err, os.ErrNotExist) {
		return f, nil
	}
	if err != nil {
		return f, err
	}
	if err := json.Unmarshal(data, &f); err != nil {
		return f, fmt.Errorf("reading %s: %w", name, err)
	}
	return f, nil
}

// recordFloors writes the floors of what was measured. Those of other cases stay where they were recorded under the same
// condition.
func recordFloors(name string, here condition, results []result) error {
	f, err := readFloors(name)
	if err != nil {
		return err
	}
	if f.condition != here || f.Cases == nil {
		f = floors{condition: here, Cases: make(map[string]floor)}
	}
	for c, limit := range newFloors(results) {
		f.Cases[c] = limit
	}
	data, err := json.MarshalIndent(f, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(name, append(data, '\n'), 0o644)
}

// checkFloors compares what was measured with the recorded floors, and says where it cannot.
func checkFloors(say io.Writer, name string, here condition, results []result) error {
	f, err := readFloors(name)
	switch {
	case err != nil:
		return err
	case f.Cases == nil:
		fmt.Fprintf(say, "Not compared with floors: %s has none (make bench-record).\n", name)
		return nil
	case f.condition != here:
		fmt.Fprintf(say, "Not compared with the floors of %s: they were recorded with %v, and this is %v.\n", name, f.condition, here)
		return nil
	}
	if err := f.broken(results); err != nil {
		return fmt.Errorf("worse than %s allows:\n%w", name, err)
	}
	return nil
}
