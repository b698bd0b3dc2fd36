package qcow2_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/droverproject/drover/qcow2"
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
// qemu-img bench do the same in the same run.
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
		for _, n := range []int{4 << 10, 1 << 20} {
			b.Run(fmt.Sprintf("%s/%dk/drover", kind, n>>10), func(b *testing.B) {
				b.SetBytes(size)
				for b.Loop() {
					readThrough(b, path, n)
				}
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
