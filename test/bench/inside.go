package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/klauspost/compress/flate"

	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// What is measured without a server runs in a process of its own, so that it can be confined to some processors and nothing but
// it is in the figures: this program again, with the flag -inside.

// insideReport is what such a process prints.
type insideReport struct {
	Ops     int64   `json:"ops"`
	Seconds float64 `json:"seconds"`
	CPU     int64   `json:"cpu_ns"`
}

func runInside(ctx context.Context, args []string) (sample, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return sample{}, fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, stderr.String())
	}
	var r insideReport
	if err := json.Unmarshal(stdout.Bytes(), &r); err != nil {
		return sample{}, fmt.Errorf("%s: %w", strings.Join(args, " "), err)
	}
	if r.Ops == 0 || r.Seconds <= 0 {
		return sample{}, fmt.Errorf("%s did nothing: %s", strings.Join(args, " "), stdout.String())
	}
	return tally{ops: r.Ops, seconds: r.Seconds}.sample(time.Duration(r.CPU)), nil
}

// measureInside is the other side of runInside.
func measureInside(ctx context.Context, out io.Writer, what string, seconds float64) error {
	kind, name, _ := strings.Cut(what, ":")
	var once func(worker *rand.Rand) (func() error, error) // makes what one goroutine repeats
	workers := coresDepth
	switch kind {
	case "library":
		f, err := storage.OpenFile(name, storage.OpenOptions{ReadOnly: true})
		if err != nil {
			return err
		}
		im, err := qcow2.Open(ctx, f, qcow2.Options{ReadOnly: true})
		if err != nil {
			return errors.Join(err, f.Close())
		}
		defer im.Close()
		once = randomReads(im.Size(), func(p []byte, off int64) error { return im.ReadAt(ctx, p, off) })
	case "pread":
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		st, err := f.Stat()
		if err != nil {
			return err
		}
		once = randomReads(st.Size(), func(p []byte, off int64) error { _, err := f.ReadAt(p, off); return err })
	case "inflate":
		clusters, err := compressedClusters(name)
		if err != nil {
			return err
		}
		once, workers = inflates(clusters), runtime.GOMAXPROCS(0)
	default:
		return fmt.Errorf("-inside: %q is none of library, pread and inflate", kind)
	}
	report, err := repeat(workers, time.Duration(seconds*float64(time.Second)), once)
	if err != nil {
		return err
	}
	return json.NewEncoder(out).Encode(report)
}

// repeat has each of some goroutines do its work again and again for a while.
func repeat(workers int, length time.Duration, work func(*rand.Rand) (func() error, error)) (r insideReport, err error) {
	var ops atomic.Int64
	var wg sync.WaitGroup
	errs := make([]error, workers)
	before, err := processTime(os.Getpid())
	if err != nil {
		return r, err
	}
	began := time.Now()
	for i := range workers {
		wg.Go(func() {
			once, err := work(rand.New(rand.NewPCG(uint64(i), 1)))
			// Looking at the clock only now and then, since that costs as much as a part of a read.
			const between = 16
			for err == nil && time.Since(began) < length {
				for n := 0; n < between && err == nil; n++ {
					err = once()
				}
				ops.Add(between)
			}
			errs[i] = err
		})
	}
	wg.Wait()
	r.Ops, r.Seconds = ops.Load(), time.Since(began).Seconds()
	after, err := processTime(os.Getpid())
	r.CPU = int64(after - before)
	return r, errors.Join(append(errs, err)...)
}

// randomReads reads 4 KiB anywhere on a disk.
func randomReads(size int64, read func(p []byte, off int64) error) func(*rand.Rand) (func() error, error) {
	return func(r *rand.Rand) (func() error, error) {
		p := make([]byte, 4096)
		return func() error { return read(p, r.Int64N(size/4096)*4096) }, nil
	}
}

// A cluster's length in the images that compressedClusters reads, which are qemu-img's with its defaults, and how many of them
// make one operation of 1 MiB.
const (
	zlibCluster  = 64 << 10
	inflatedAtOp = 16
)

// inflates unpacks a MiB.
func inflates(clusters [][]byte) func(*rand.Rand) (func() error, error) {
	return func(r *rand.Rand) (func() error, error) {
		var src bytes.Reader
		dec := flate.NewReader(&src)
		p := make([]byte, zlibCluster)
		next := r.IntN(len(clusters))
		return func() error {
			for range inflatedAtOp {
				src.Reset(clusters[next])
				next = (next + 1) % len(clusters)
				if err := dec.(flate.Resetter).Reset(&src, nil); err != nil {
					return err
				}
				if _, err := io.ReadFull(dec, p); err != nil {
					return err
				}
			}
			return nil
		}, nil
	}
}

// compressedClusters returns the compressed data of all clusters of an image, read by the format's description alone, so that
// nothing of drover's is in the yardstick.
func compressedClusters(name string) ([][]byte, error) {
	image, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	if len(image) < 72 || binary.BigEndian.Uint32(image[20:]) != 16 {
		return nil, fmt.Errorf("%s is no image with clusters of 64 KiB", name)
	}
	table := func(off, entries uint64) ([]byte, error) {
		if off > uint64(len(image)) || entries > (uint64(len(image))-off)/8 {
			return nil, fmt.Errorf("%s has a table beyond its end, at %#x", name, off)
		}
		return image[off : off+8*entries], nil
	}
	const pointer = 1<<56 - 1<<9 // of an entry that is not compressed
	const offsetBits = 62 - (16 - 8)
	l1, err := table(binary.BigEndian.Uint64(image[40:]), uint64(binary.BigEndian.Uint32(image[36:])))
	if err != nil {
		return nil, err
	}
	var all [][]byte
	for ; len(l1) > 0; l1 = l1[8:] {
		at := binary.BigEndian.Uint64(l1) & pointer
		if at == 0 {
			continue
		}
		l2, err := table(at, zlibCluster/8)
		if err != nil {
			return nil, err
		}
		for ; len(l2) > 0; l2 = l2[8:] {
			e := binary.BigEndian.Uint64(l2)
			if e>>62&1 == 0 {
				continue
			}
			from := e & (1<<offsetBits - 1)
			end := from - from%512 + (e>>offsetBits&(1<<8-1)+1)*512
			if from >= uint64(len(image)) {
				return nil, fmt.Errorf("%s has a cluster beyond its end, at %#x", name, from)
			}
			all = append(all, image[from:min(end, uint64(len(image)))])
		}
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("%s has no compressed cluster", name)
	}
	return all, nil
}
