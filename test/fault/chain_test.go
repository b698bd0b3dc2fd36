package fault

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/test/explore"
)

// TestChains fails each call that commits and rebases make of either file. The disk stays the same in memory and on the host,
// and the change can be made again.
func TestChains(t *testing.T) {
	for _, c := range explore.Chains() {
		t.Run(c.Name, func(t *testing.T) {
			t.Parallel()
			p := c.Make(t)
			for which := range 2 {
				calls, err := chainWith(p, which, nil)
				if err != nil {
					t.Fatal(err)
				}
				step := *stride
				if testing.Short() {
					step *= 3
				}
				for at := 0; at < calls; at += step {
					for _, f := range faults(at) {
						total.Add(1)
						if _, err := chainWith(p, which, &f); err != nil {
							t.Fatalf("file %d, fault %+v: %v", which, f, err)
						}
					}
				}
			}
		})
	}
}

// chainWith makes the change with one fault of one of the files and returns how many calls it made of that.
func chainWith(p *explore.Pair, which int, fault *storage.Fault) (calls int, err error) {
	ctx := context.Background()
	mem := [2]*storage.MemFile{p.Top.Clone(), p.Bottom.Clone()}
	var files [2]*storage.FaultFile
	for i, m := range mem {
		files[i] = storage.NewFaultFile(explore.KeepOpen{File: m})
	}
	im, err := p.Open(files[0], files[1], false)
	if err != nil {
		return 0, err
	}
	before := files[which].Calls(storage.OpAny)
	if fault != nil {
		files[which].Inject(*fault)
	}
	changed := p.Run(ctx, im, p.OtherDevice())
	calls = files[which].Calls(storage.OpAny) - before
	files[which].Clear()
	if changed != nil && !isFault(changed) {
		return 0, errors.Join(fmt.Errorf("the change returned: %w", changed), im.Close())
	}
	if changed == nil {
		if err := im.Close(); err != nil {
			return 0, err
		}
	} else if err := im.Close(); err != nil && !isFault(err) {
		return 0, err
	}
	if err := p.Judge(mem[0], mem[1], changed == nil); err != nil {
		return 0, err
	}
	if changed != nil {
		if err := p.Again(mem[0], mem[1]); err != nil {
			return 0, err
		}
	}
	return calls, soundChain(p, mem, changed != nil)
}

// soundChain checks the closed images. What failed half way may have left leaks where the image cannot say that it needs a
// repair.
func soundChain(p *explore.Pair, mem [2]*storage.MemFile, failed bool) error {
	for i, f := range mem {
		if i == 1 && p.RawBase > 0 {
			continue
		}
		report, err := qcow2.CheckFile(context.Background(), f, qcow2.CheckOptions{})
		if err != nil {
			return err
		}
		leaky := failed && (p.Overlay.Version == 2 || i == 1 && p.Base.Version == 2)
		if report.Corruptions != 0 || report.CheckErrors != 0 || report.Leaks != 0 && !leaky {
			return fmt.Errorf("check of file %d: %+v", i, report)
		}
	}
	return nil
}
