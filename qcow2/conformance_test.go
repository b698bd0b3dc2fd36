package qcow2_test

import (
	"context"
	"fmt"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/block/blocktest"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// TestDeviceContract runs the suite that every block.Device passes.
func TestDeviceContract(t *testing.T) {
	for _, o := range []qcow2.CreateOptions{
		{Size: 1<<20 + 1536},
		{Size: 1 << 20, ClusterSize: 512, RefcountBits: 1},
		{Size: 1 << 20, ClusterSize: 4096, Version: 2},
		{Size: 4 << 20, ClusterSize: 2 << 20, Preallocation: qcow2.PreallocMetadata},
	} {
		t.Run(fmt.Sprintf("cluster=%d,v%d", o.ClusterSize, o.Version), func(t *testing.T) {
			blocktest.Run(t, func(t *testing.T) block.Device {
				f := storage.NewMemFile("contract.qcow2")
				if err := qcow2.Create(context.Background(), f, o); err != nil {
					t.Fatal(err)
				}
				im, err := qcow2.Open(context.Background(), f, qcow2.Options{CacheSize: 1})
				if err != nil {
					t.Fatal(err)
				}
				return im
			})
		})
	}
}
