package qcow2_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/qcow2/internal/codec"
	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/storage"
)

// someText returns n bytes that shrink to about two thirds, as files on a disk do.
func someText(n int) []byte {
	r := rand.New(rand.NewPCG(1, 1))
	words := make([][]byte, 3000)
	for i := range words {
		for range 3 + r.IntN(6) {
			words[i] = append(words[i], byte('a'+r.IntN(26)))
		}
	}
	var b bytes.Buffer
	for b.Len() < n {
		for range 300 {
			b.Write(words[r.IntN(len(words))])
			b.WriteByte(' ')
		}
		for range 25 {
			fmt.Fprintf(&b, "%c%c%c%c", byte(r.Uint32()), byte(r.Uint32()), byte(r.Uint32()), byte(r.Uint32()))
		}
	}
	return b.Bytes()[:n]
}

// BenchmarkCompressedRead reads a compressed image from end to end, by 4 KiB and by 1 MiB, one request at a time, and has
// qemu-img bench do the same in the same run. The codec alone, on the same clusters in memory, is the yardstick: more than
// it does on all processors nobody can read.
func BenchmarkCompressedRead(b *testing.B) {
	if _, err := exec.LookPath("qemu-img"); err != nil {
		b.Skip("qemu-img is not installed")
	}
	const size = 64 << 20
	dir := b.TempDir()
	raw := filepath.Join(dir, "in.raw")
	if err := os.WriteFile(raw, someText(size), 0o600); err != nil {
		b.Fatal(err)
	}
	for _, kind := range []string{"zlib", "zstd"} {
		path := filepath.Join(dir, kind+".qcow2")
		out, err := exec.Command("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "compression_type="+kind, raw, path).CombinedOutput()
		if err != nil {
			b.Fatalf("%v: %s", err, out)
		}
		streams, t := compressedStreams(b, path)
		for _, n := range []int{1, runtime.GOMAXPROCS(0)} {
			b.Run(fmt.Sprintf("%s/codec/%d", kind, n), func(b *testing.B) {
				measured(b, size, func() { unpackAll(b, streams, t, n) })
			})
		}
		for _, n := range []int{4 << 10, 1 << 20} {
			b.Run(fmt.Sprintf("%s/%dk/drover", kind, n>>10), func(b *testing.B) {
				measured(b, size, func() { readThrough(b, path, n) })
			})
			b.Run(fmt.Sprintf("%s/%dk/stock", kind, n>>10), func(b *testing.B) {
				b.SetBytes(size)
				for b.Loop() {
					count, block := fmt.Sprint(size/n), fmt.Sprint(n)
					out, err := exec.Command("qemu-img", "bench", "-f", "qcow2", "-U", "-c", count, "-s", block, "-d", "1", path).CombinedOutput()
					if err != nil {
						b.Fatalf("%v: %s", err, out)
					}
				}
			})
		}
	}
}

// measured runs fn, which reads so many bytes, and reports the processor time that a MiB takes, too: unlike the rate it says
// something on a busy machine.
func measured(b *testing.B, size int64, fn func()) {
	b.SetBytes(size)
	began := cpuTime(b)
	for b.Loop() {
		fn()
	}
	b.ReportMetric(float64(cpuTime(b)-began)/float64(b.N)/float64(size>>20)/1e3, "CPU-µs/MiB")
}

func readThrough(b *testing.B, path string, n int) {
	b.Helper()
	file, err := storage.OpenFile(path, storage.OpenOptions{ReadOnly: true})
	if err != nil {
		b.Fatal(err)
	}
	im, err := qcow2.Open(context.Background(), file, qcow2.Options{ReadOnly: true, CacheCleanInterval: time.Hour})
	if err != nil {
		b.Fatal(err)
	}
	defer im.Close()
	p := make([]byte, n)
	for off := int64(0); off < im.Size(); off += int64(n) {
		if im.TryReadAt(p, off) == nil {
			continue
		}
		if err := im.ReadAt(context.Background(), p, off); err != nil {
			b.Fatal(err)
		}
	}
}

// compressedStreams returns the streams of an image in the order of its disk, and their type.
func compressedStreams(b *testing.B, path string) (streams [][]byte, kind uint8) {
	b.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		b.Fatal(err)
	}
	h, err := format.ParseHeader(raw)
	if err != nil {
		b.Fatal(err)
	}
	lay := h.Layout()
	words := func(off format.HostOff, n int64) []uint64 {
		list := make([]uint64, n)
		format.DecodeTable(list, raw[off:])
		return list
	}
	for _, l1 := range words(h.L1Offset, int64(h.L1Size)) {
		if format.L1Entry(l1).Offset() == 0 {
			continue
		}
		for _, w := range words(format.L1Entry(l1).Offset(), lay.L2Entries()) {
			if e := format.L2Entry(w); lay.Kind(e) == format.KindCompressed {
				off, n := lay.CompressedExtent(e)
				streams = append(streams, raw[off:min(int64(off)+n, int64(len(raw)))])
			}
		}
	}
	if len(streams) == 0 {
		b.Fatal("nothing is compressed")
	}
	return streams, uint8(h.CompressionType)
}

// unpackAll unpacks streams on n goroutines.
func unpackAll(b *testing.B, streams [][]byte, kind uint8, n int) {
	var next atomic.Int64
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			dst := make([]byte, 64<<10)
			for i := next.Add(1) - 1; i < int64(len(streams)); i = next.Add(1) - 1 {
				if err := codec.Decompress(kind, dst, streams[i]); err != nil {
					b.Error(err)
				}
			}
		})
	}
	wg.Wait()
}
