package tcmu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/scsi"
	"github.com/droverproject/drover/storage"
	"golang.org/x/sys/unix"
)

const (
	benchRing = 128 << 10
	benchData = 32 << 20
	benchDisk = 256 << 20
	// initiatorEnv makes the test program the other side of a ring, with these parameters.
	initiatorEnv = "DROVER_TEST_INITIATOR"
)

// load is what an initiator in a process of its own sends.
type load struct {
	name         string
	write        bool
	size, pieces int // of a command; pieces do not touch each other in the data area
	depth        int
}

var loads = []load{
	{"read-4k-q1", false, 4096, 1, 1}, {"read-4k-q32", false, 4096, 1, 32},
	{"write-4k-q1", true, 4096, 1, 1}, {"write-4k-q32", true, 4096, 1, 32},
	{"read-1m-q8", false, 1 << 20, 1, 8}, {"read-1m-q8-pieces", false, 1 << 20, 256, 8}, {"write-1m-q8-pieces", true, 1 << 20, 256, 8},
}

// BenchmarkServe runs commands from another process through a ring, the command set and a raw disk in the page cache, with the
// doorbells that a uio device has. The time of the processor is this side's alone.
func BenchmarkServe(b *testing.B) {
	for _, l := range loads {
		b.Run(l.name, func(b *testing.B) { serveLoad(b, l) })
	}
}

func serveLoad(b *testing.B, l load) {
	mem, memFile := sharedRing(b)
	kernelIn(mem, benchRing)
	ring, err := NewRing(mem)
	must(b, err)
	// Descriptors that block, so that the runtime's poller, which would be woken by each of our own writes, has none of them.
	in, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	must(b, err)
	var pipe [2]int
	must(b, unix.Pipe2(pipe[:], unix.O_CLOEXEC))
	bell, err := newBell("test", in, pipe[1])
	must(b, err)
	defer bell.close()
	toUs, fromUs, toThem := os.NewFile(uintptr(in), "eventfd"), os.NewFile(uintptr(pipe[0]), "pipe"), os.NewFile(uintptr(pipe[1]), "pipe")
	for _, f := range []*os.File{toUs, fromUs, toThem} {
		defer f.Close()
	}
	server := NewServer(ring, benchUnit(b), bell)
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(context.Background()) }()

	initiator := exec.Command(os.Args[0], "-test.run=^TestInitiator$")
	initiator.Env = append(os.Environ(), fmt.Sprintf("%s=%t %d %d %d %d", initiatorEnv, l.write, l.size, l.pieces, l.depth, b.N))
	initiator.ExtraFiles = []*os.File{memFile, toUs, fromUs}
	initiator.Stderr = os.Stderr
	begun, err := initiator.StdoutPipe()
	must(b, err)
	must(b, initiator.Start())
	_, err = io.ReadFull(begun, make([]byte, 1))
	must(b, err)
	b.ResetTimer()
	b.ReportAllocs()
	spent := processorTime()
	_, _ = io.Copy(io.Discard, begun)
	spent = processorTime() - spent
	b.StopTimer()
	must(b, initiator.Wait())
	b.ReportMetric(float64(spent.Nanoseconds())/float64(b.N), "cpu-ns/op")
	must(b, bell.stop())
	if err := <-ended; !errors.Is(err, os.ErrClosed) {
		b.Fatal(err)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func processorTime() time.Duration {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func sharedRing(b *testing.B) ([]byte, *os.File) {
	fd, err := unix.MemfdCreate("ring", unix.MFD_CLOEXEC)
	must(b, err)
	f := os.NewFile(uintptr(fd), "ring")
	size := dataPlace(benchRing) + benchData
	must(b, f.Truncate(int64(size)))
	mem, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	must(b, err)
	b.Cleanup(func() {
		_ = unix.Munmap(mem)
		_ = f.Close()
	})
	return mem, f
}

func benchUnit(b *testing.B) *scsi.Unit {
	f, err := storage.CreateFile(filepath.Join(b.TempDir(), "disk.raw"), storage.OpenOptions{})
	must(b, err)
	must(b, f.Truncate(benchDisk))
	im, err := block.NewRaw(f, block.RawOptions{})
	must(b, err)
	b.Cleanup(func() { _ = im.Close() })
	// In pieces of 4 KiB: where the page cache has larger ones, writing a part of one costs many times as much.
	p := make([]byte, 4096)
	for i := range p {
		p[i] = byte(i * 7)
	}
	for off := int64(0); off < benchDisk; off += int64(len(p)) {
		must(b, im.WriteAt(b.Context(), p, off, 0))
	}
	must(b, im.Flush(b.Context()))
	u, err := scsi.NewUnit(im, scsi.Options{})
	must(b, err)
	u.Execute(b.Context(), make([]byte, 6), nil) // the unit attention
	return u
}

// TestInitiator is the other side of BenchmarkServe: it keeps so many commands under way, rings for each, and takes what was
// completed, as an initiator and the kernel do together.
func TestInitiator(t *testing.T) {
	text := os.Getenv(initiatorEnv)
	if text == "" {
		t.Skip("it is the other side of BenchmarkServe")
	}
	var l load
	var total int
	_, err := fmt.Sscan(text, &l.write, &l.size, &l.pieces, &l.depth, &total)
	must(t, err)
	mem, err := unix.Mmap(3, 0, dataPlace(benchRing)+benchData, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	must(t, err)
	k := kernelIn(mem, benchRing)
	r := rand.New(rand.NewPCG(1, 2))
	op := byte(0x88)
	if l.write {
		op = 0x8A
	}
	cdb := rw(op, 0, uint32(l.size/512))
	one := [8]byte{1}
	vectors := make([][2]int, l.pieces)
	piece := l.size / l.pieces
	send := func(id int) {
		lba := uint64(r.IntN(benchDisk/l.size)) * uint64(l.size/512)
		copy(cdb[2:], rw(op, lba, 0)[2:10])
		for i := range vectors {
			at := (i*l.depth + id) * piece // those of one command do not touch each other
			vectors[i] = [2]int{at, piece}
		}
		if !k.send(uint16(id+1), cdb, vectors) {
			t.Fatal("the ring is full")
		}
		_, err := unix.Write(4, one[:])
		must(t, err)
	}
	fmt.Print("\n")
	got := make(map[uint16]response, l.depth)
	sent := min(l.depth, total)
	for id := range sent {
		send(id)
	}
	buf := make([]byte, 4096)
	for done := 0; done < total; {
		_, err := unix.Read(5, buf)
		must(t, err)
		k.take(got)
		for id, res := range got {
			if res.status != 0 {
				t.Fatalf("command %d: %+v", id, res)
			}
			done++
			if sent < total {
				sent++
				send(int(id) - 1)
			}
		}
		clear(got)
	}
	os.Exit(0)
}
