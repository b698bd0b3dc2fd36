package meta

import (
	"fmt"
	"testing"

	"github.com/droverproject/drover/qcow2/internal/format"
)

// TestAllocRow: a row is one run however long, and nobody gets any of it again.
func TestAllocRow(t *testing.T) {
	for order := range uint8(7) {
		t.Run(fmt.Sprintf("order=%d", order), func(t *testing.T) {
			rc, _ := newTestRefcounts(t, format.Layout{ClusterBits: 9, RefcountOrder: order, Version: 3})
			held := map[format.ClusterIdx]bool{0: true, 1: true, 2: true}
			for _, n := range []int64{1, 5, 63, 64, 200, 3, 5000, 1, 20000, 70} {
				run, err := rc.AllocRow(n)
				if err != nil {
					t.Fatal(err)
				}
				if run.N != n {
					t.Fatalf("a row of %d, want %d", run.N, n)
				}
				for c := run.First; c < run.End(); c++ {
					if held[c] {
						t.Fatalf("cluster %d was handed out twice", c)
					}
					held[c] = true
					if v, err := rc.Get(c); err != nil || v != 1 {
						t.Fatalf("cluster %d has count %d, %v", c, v, err)
					}
				}
			}
			end, err := rc.UsedEnd()
			if err != nil {
				t.Fatal(err)
			}
			for c := range held {
				if c >= end {
					t.Fatalf("cluster %d is behind the end, %d", c, end)
				}
			}
			if _, err := rc.AllocRow(1 << 40); err == nil {
				t.Error("a row longer than any file was handed out")
			}
		})
	}
}
