package qcow2_test

import (
	"context"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// benchImage makes an image on the host's file system with its first size bytes written.
func benchImage(b *testing.B, size, written int64) *qcow2.Image {
	b.Helper()
	ctx := context.Background()
	f, err := storage.CreateFile(filepath.Join(b.TempDir(), "bench.qcow2"), storage.OpenOptions{})
	if err != nil {
		b.Fatal(err)
	}
	if err := qcow2.Create(ctx, f, qcow2.CreateOptions{Size: size}); err != nil {
		b.Fatal(err)
	}
	im, err := qcow2.Open(ctx, f, qcow2.Options{})
	if err != nil {
		b.Fatal(err)
	}
	p := make([]byte, 4096)
	for i := range p {
		p[i] = byte(i)
	}
	for off := int64(0); off < written; off += 4096 {
		if err := im.WriteAt(ctx, p, off, 0); err != nil {
			b.Fatal(err)
		}
	}
	b.Cleanup(func() { im.Close() })
	return im
}

func BenchmarkTryRead4K(b *testing.B) {
	im := benchImage(b, 256<<20, 256<<20)
	b.ResetTimer() // which b.Loop does by itself
	b.RunParallel(func(pb *testing.PB) {
		p := make([]byte, 4096)
		r := rand.New(rand.NewPCG(1, rand.Uint64()))
		for pb.Next() {
			if err := im.TryReadAt(p, r.Int64N(256<<20/4096)*4096); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportAllocs()
}

func BenchmarkTryReadZero4K(b *testing.B) {
	im := benchImage(b, 256<<20, 4096)
	p := make([]byte, 4096)
	b.ReportAllocs()
	for b.Loop() {
		if err := im.TryReadAt(p, 1<<20); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkTryOverwrite4K(b *testing.B) {
	im := benchImage(b, 256<<20, 256<<20)
	p := make([]byte, 4096)
	r := rand.New(rand.NewPCG(1, 2))
	b.ReportAllocs()
	for b.Loop() {
		if err := im.TryWriteAt(p, r.Int64N(256<<20/4096)*4096); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkAllocatingWrite4K(b *testing.B) {
	im := benchImage(b, 1<<40, 0)
	p := make([]byte, 4096)
	p[0] = 1
	r := rand.New(rand.NewPCG(1, 2))
	b.ReportAllocs()
	for b.Loop() {
		if err := im.WriteAt(context.Background(), p, r.Int64N(1<<30/4096)*4096, 0); err != nil {
			b.Fatal(err)
		}
	}
}

// pagesOf cuts memory into pages that do not touch, as a transport's are.
func pagesOf(n int) [][]byte {
	memory := make([]byte, 2*n)
	pages := make([][]byte, n/4096)
	for i := range pages {
		pages[i] = memory[i*8192:][:4096]
	}
	return pages
}

func BenchmarkTryPieces1M(b *testing.B) {
	im := benchImage(b, 256<<20, 256<<20)
	pages := pagesOf(1 << 20)
	r := rand.New(rand.NewPCG(1, 2))
	for name, call := range map[string]func([][]byte, int64) error{
		"read": im.TryReadVAt, "overwrite": im.TryWriteVAt,
		"read-one-by-one": func(bufs [][]byte, off int64) error {
			return block.ReadPieces(bufs, off, func(p []byte, off int64) error { return im.TryReadAt(p, off) })
		},
		"overwrite-one-by-one": func(bufs [][]byte, off int64) error {
			return block.WritePieces(bufs, off, func(p []byte, off int64) error { return im.TryWriteAt(p, off) })
		},
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := call(pages, r.Int64N(255)<<20+r.Int64N(256)*4096); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
