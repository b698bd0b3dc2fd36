package crash

import (
	"context"
	"fmt"
	"testing"

	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/test/explore"
)

// TestChains cuts the power while images are committed and rebased, of both files at once. The disk is at no moment another,
// and what has been acknowledged is there.
func TestChains(t *testing.T) {
	for _, c := range explore.Chains() {
		t.Run(c.Name, func(t *testing.T) {
			t.Parallel()
			p := c.Make(t)
			files := storage.NewCrashFiles(p.Top.Clone(), p.Bottom.Clone())
			im, err := p.Open(files[0], files[1], false)
			if err != nil {
				t.Fatal(err)
			}
			if err := p.Run(context.Background(), im, p.OtherDevice()); err != nil {
				t.Fatal(err)
			}
			files[0].Mark("changed")
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			n := 0
			o := storage.ExploreOptions{Exhaustive: 6, PerFamily: *samples, Samples: *samples, Seed: 1}
			err = files[0].Explorer().Explore(o, func(state storage.CrashState) error {
				n++
				total.Add(1)
				return judgeChain(p, state, n)
			})
			if err != nil {
				t.Fatal(err)
			}
		})
	}
}

func judgeChain(p *explore.Pair, state storage.CrashState, n int) error {
	top, bottom := state.Files[0], state.Files[1]
	images := []*storage.MemFile{top}
	if p.RawBase == 0 {
		images = append(images, bottom)
	}
	for _, f := range images {
		info, err := qcow2.ReadInfo(context.Background(), f)
		if err != nil {
			return err
		}
		// What is marked dirty with lazy refcounts is sound only when its counts have been made again, as any opening does.
		if info.Dirty && info.LazyRefcounts {
			continue
		}
		if err := sound(f); err != nil {
			return err
		}
	}
	if err := p.Judge(top, bottom, len(state.Marks) > 0); err != nil {
		return err
	}
	for _, f := range images {
		if err := sound(f); err != nil {
			return fmt.Errorf("afterwards: %w", err)
		}
		if n%61 == 0 {
			if err := stockSound(f); err != nil {
				return err
			}
		}
	}
	if n%16 != 0 {
		return nil
	}
	return p.Again(top, bottom)
}
