package qcow2_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// TestIdleCacheIsDropped reads, waits, and wants the next read to go to the file again: the idle table was let go.
func TestIdleCacheIsDropped(t *testing.T) {
	file := soundImage(t, qcow2.CreateOptions{Size: 256 << 10, ClusterSize: 4096})
	synctest.Test(t, func(t *testing.T) {
		counted := storage.NewFaultFile(keepOpen{file})
		im, err := qcow2.Open(context.Background(), counted, qcow2.Options{CacheCleanInterval: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, 10)
		reads := func() int {
			before := counted.Calls(storage.OpRead)
			if err := im.ReadAt(context.Background(), p, 9000); err != nil { // a zero cluster: only tables are read
				t.Fatal(err)
			}
			return counted.Calls(storage.OpRead) - before
		}
		if n := reads(); n != 2 {
			t.Fatalf("the first read made %d reads, want one of the L1 table and one of the L2 table", n)
		}
		if n := reads(); n != 0 {
			t.Fatalf("a read of what is cached made %d reads", n)
		}
		time.Sleep(3 * time.Minute) // in the bubble's time: no test waits for it
		synctest.Wait()
		if n := reads(); n != 1 {
			t.Fatalf("after three idle intervals a read made %d reads, want one of the L2 table", n)
		}
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
	})
}
